"""metrics.jsonl, event files, the progress bar, curves.png, device peaks."""

import io
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.data import images
from vlm_jax.machines import hardware
from vlm_jax.program import config as config_lib
from vlm_jax.program import curves, metric_writer, progress, provenance


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_one_line_per_write_is_on_disk_at_once(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, tensorboard=False)
    writer.write(1, {"train/loss": 0.1, "n": 3})
    assert _lines(tmp_path) == [{"step": 1, "train/loss": 0.1, "n": 3}]
    writer.write(2, {"train/loss": np.float32(0.1)})
    assert _lines(tmp_path)[1] == {"step": 2, "train/loss": float(np.float32(0.1))}
    writer.close()
    writer.close()


def test_resuming_cuts_what_came_after_and_a_half_line(tmp_path):
    with metric_writer.MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": 1 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    with metric_writer.MetricWriter(tmp_path, start_step=2, tensorboard=False) as writer:
        writer.write(3, {"loss": 1 / 3})
    assert _lines(tmp_path) == [{"step": s, "loss": 1 / s} for s in (1, 2, 3)]


def _resume_at(workdir, step):
    metric_writer.MetricWriter(workdir, start_step=step, tensorboard=False).close()
    return (workdir / "metrics.jsonl").read_bytes().splitlines()


def test_what_is_kept_is_not_rewritten(tmp_path):
    lines = [
        b'{"step":1,  "loss": 1.50}',
        b"[" * 100_000,
        b"\xff\xfe not ours",
        b'{"step": 2}',
        b'{"step": true}',
        b'{"step": 3}',
        b"a late stranger",
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    number = path.stat().st_ino
    assert [entry["step"] for entry in metric_writer.read(tmp_path)] == [1, 2, 3]
    assert _resume_at(tmp_path, 2) == lines[:5]
    assert path.stat().st_ino == number  # cut back, not replaced
    assert _resume_at(tmp_path, 0) == []


def test_lines_of_two_runs_in_one_file_are_sorted_out(tmp_path):
    lines = [b'{"step": 1}', b'{"step": 3}', b'{"step": 2}', b'{"step": 4}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert _resume_at(tmp_path, 2) == [b'{"step": 1}', b'{"step": 2}']


def test_not_a_number_is_null_so_that_every_line_is_json(tmp_path):
    with metric_writer.MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    assert _lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]


def test_device_arrays_are_refused(tmp_path):
    with metric_writer.MetricWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(TypeError, match="'train/loss'.*device_get"):
            writer.write(1, {"train/loss": jnp.ones(())})
    assert _lines(tmp_path) == []


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_writer.jax, "process_index", lambda: 1)
    with metric_writer.MetricWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_event_files(tmp_path):
    pytest.importorskip("tensorboardX")
    config = {"train": {"steps": 7}}
    with metric_writer.MetricWriter(tmp_path, config=config) as writer:
        writer.write(1, {"train/loss": 2.5})
        writer.show(1, "eval/a", evaluated(tmp_path / "a"))
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    for shown in (b"train/loss", b'"steps": 7', b"eval/a/samples", b"eval/a/table", b"| f1 & \xc3"):
        assert shown in content
    assert content.count(b"\x89PNG") == 1


def evaluated(folder):
    """What an evaluation leaves."""
    folder.mkdir()
    (folder / "samples.png").write_bytes(images.encode(np.zeros((4, 6, 3), np.uint8)))
    (folder / "table.md").write_text("| f1 & \u00fc |", encoding="utf-8")
    (folder / "predictions.jsonl").write_text("{}")
    return folder


def test_wandb_missing_is_said_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(config_lib.ConfigError, match="wandb='paintings'.*not installed"):
        metric_writer.MetricWriter(tmp_path, wandb="paintings")


def test_wandb_continues_the_same_page(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finished")

    def init(**fields):
        calls.append(fields)
        return Run()

    fake = types.SimpleNamespace(
        init=init, Image=lambda path: ("image", path), Html=lambda text: ("html", text)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = evaluated(tmp_path / "a")
    for start in (0, 1):
        with metric_writer.MetricWriter(
            tmp_path, start, tensorboard=False, wandb="p", config={"steps": start}
        ) as writer:
            writer.write(start + 1, {"loss": 1.0})
            writer.show(start + 1, "eval/a", folder)
            writer.show(start + 1, "eval/b", tmp_path / "nothing_there")
    began = [c for c in calls if isinstance(c, dict)]
    assert [(c["id"], c["config"]["steps"]) for c in began] == [(None, 0), ("abc", 1)]
    assert ({"loss": 1.0}, 2) in calls and calls[-1] == "finished"
    shown = {
        "eval/a/samples": ("image", str(folder / "samples.png")),
        "eval/a/table": ("html", "<pre>| f1 &amp; \u00fc |</pre>"),
    }
    assert [c for c in calls if isinstance(c, tuple) and "loss" not in c[0]] == [
        (shown, 1),
        (shown, 2),
    ]


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal():
    stream = _Terminal()
    bar = progress.Progress(0, 100, units=("tokens", 1000.0), stream=stream)
    bar.update(50, 1.5, {"speed/steps_per_s": 2.0, "speed/mfu": 0.4})
    drawn = stream.getvalue()
    assert drawn.startswith("\r") and "\n" not in drawn
    for part in ("[##########..........]", "step 50/100", "loss 1.5", "2 steps/s", "2k tokens/s"):
        assert part in drawn
    bar.close()
    bar.close()
    assert stream.getvalue().count("\n") == 1


def test_line_shows_mfu_and_eta():
    bar = progress.Progress(0, 4000, units=("images", 10.0), stream=io.StringIO())
    line = bar._line(400, 2.0, {"speed/steps_per_s": 0.5, "speed/mfu": 0.417})
    assert line.endswith("0.5 steps/s  5 images/s  MFU 41.7%  ETA 2:00:00")


def test_elsewhere_plain_lines_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    bar = progress.Progress(0, 10, stream=stream)
    for step, at_s in ((1, 1), (2, 2), (3, 12), (4, 13), (10, 14)):
        now[0] = float(at_s)
        bar.update(step, 1.0, {})
    bar.close()
    shown = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert shown == ["1/10", "3/10", "10/10"] and "\r" not in stream.getvalue()


def test_the_first_updates_are_shown_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    bar = progress.Progress(20, 82, stream=stream)
    for step, at_s in ((21, 112.5), (22, 114.5)):
        now[0] = at_s
        bar.begin(step, 3.0)
    assert stream.getvalue().splitlines() == [
        "step 21/82  loss 3  first update in 12.5 s, most of it compiling",
        "step 22/82  loss 3  2 s per update  ETA 2:00",
    ]


def test_speed_leaves_out_the_time_of_evaluations(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress(
        20, 100, units=("rows", 8.0), flops_per_step=3e9, peak_flops=6e9, stream=io.StringIO()
    )
    now[0] = 105.0
    bar.pause()
    now[0] = 1000.0
    bar.resume()
    now[0] = 1005.0
    assert bar.speed(30) == {
        "speed/steps_per_s": 1.0,
        "speed/rows_per_s": 8.0,
        "speed/mfu": 0.5,
    }
    assert bar.speed(30) == {}
    now[0] = 2000.0
    bar.restart(31)
    now[0] = 2004.0
    assert bar.speed(33)["speed/steps_per_s"] == 0.5


@pytest.mark.parametrize("matplotlib", [True, False])
def test_curves(tmp_path, monkeypatch, matplotlib):
    image = pytest.importorskip("PIL.Image")
    if matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.setitem(sys.modules, "matplotlib.backends", None)
    assert curves.draw(tmp_path) is None
    with metric_writer.MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 20):
            speed = {"speed/steps_per_s": 1.0 + step, "speed/rows_per_s": 2.0 * step}
            writer.write(step, {**speed, "train/loss": 5 / step})
        writer.write(19, {"held_out/loss": 2.0})
        writer.write(19, {"broken": float("nan")})
    with open(tmp_path / metric_writer.FILE, "a") as file:
        file.write(json.dumps({"step": 19, "edited": 10**400}) + "\n")
    names = list(curves.collect(tmp_path))
    assert names == ["train/loss", "held_out/loss", "speed/steps_per_s", "speed/rows_per_s"]
    path = curves.draw(tmp_path)
    with image.open(path) as picture:
        assert picture.width > 3 * picture.height > 600
        # The line of the first panel is there, in its colour.
        pixels = np.asarray(picture.convert("RGB"))[:, : picture.width // 3]
    assert (pixels == (0x1F, 0x77, 0xB4)).all(-1).sum() > 50


def test_curves_draw_baselines_beside_and_constants_in_a_table(tmp_path):
    scores = {
        "train/loss": [(1, 5.0), (2, 4.0)],
        "train/lr": [(1, 0.1), (2, 0.1)],
        "eval/a/token_perplexity": [(1, 90.0), (2, 80.0)],
        "eval/a/unigram_perplexity": [(1, 99.0), (2, 99.0)],
        "eval/b/f1": [(2, 0.5)],
        "eval/b/nearest_f1": [(2, 0.3)],
        "eval/b/alone_f1": [(2, 0.7)],
    }
    baselines = {
        "eval/a/unigram_perplexity": "eval/a/token_perplexity",
        "eval/b/nearest_f1": "eval/b/f1",
        "eval/b/alone_f1": "eval/b/missing",
    }
    panels, lines = curves.arrange(scores, baselines)
    assert [panel.name for panel in panels] == ["train/loss", "eval/a/token_perplexity"]
    assert panels[1].baselines == {"unigram": [(1, 99.0), (2, 99.0)]}
    assert [line.split() for line in lines] == [
        ["train/lr", "0.1"],
        ["eval/b/f1", "0.5", "nearest", "0.3"],
        ["eval/b/alone_f1", "0.7"],
    ]
    many = {f"m{i}": [(1, 0.0), (2, float(i + 1))] for i in range(60)}
    panels, lines = curves.arrange(many, {})
    assert len(panels) == 12 and len(lines) == 36
    assert lines[-1] == "and 13 more in metrics.jsonl"


def test_peaks():
    def device(kind):
        return types.SimpleNamespace(device_kind=kind)

    assert hardware.peak_flops(device("NVIDIA H200")) == 989e12
    assert hardware.peak_flops(device("NVIDIA H100 80GB HBM3")) == 989e12
    assert hardware.memory_bandwidth(device("NVIDIA H200 NVL")) == 4800e9
    assert hardware.peak_flops(device("TPU v5 lite")) == 197e12
    assert hardware.peak_flops(device("TPU v4")) == 275e12
    assert hardware.peak_flops(device("cpu")) is None
    assert hardware.peak_flops(device("NVIDIA L40")) is None
    assert hardware.memory_bandwidth(device("NVIDIA T4")) is None


def test_provenance_names_versions_and_is_json():
    found = json.loads(json.dumps(provenance.collect()))
    assert found["versions"]["jax"].count(".") >= 2 and "python" in found["versions"]
    assert found["git"] == "" or len(found["git"].removesuffix("+changes")) == 40
