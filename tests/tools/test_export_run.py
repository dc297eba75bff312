"""Small folders made of runs, and what `load` makes of them."""

import hashlib
import json

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax import checkpoints
from vlm_jax.decoding import sampling
from vlm_jax.models import vqgan as vqgan_model
from vlm_jax.nn import functional
from vlm_jax.systems import lvm
from vlm_jax.tools import export_run
from vlm_jax.weights import shipped, vqgan

MODEL = dict(vocab_size=1124, width=16, depth=1, mlp_width=32, num_heads=2)
TASK = dict(
    tokenizer="tiny", image_side=8, codebook_size=1024, tokens_per_image=4, context_images=3
)
FORMATTER = dict(
    max_tokens=16, fields="<|bos|>,{tokens}", bos_id=1024, eos_id=1025, vocab_size=1124
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A work directory with random parameters, and an average of other ones."""
    workdir = tmp_path_factory.mktemp("run")
    config = dict(system="lvm", model=MODEL, task=TASK, formatter=FORMATTER, optim=dict(ema=0.9))
    (workdir / "config.json").write_text(json.dumps({"config": config}))
    params = lvm.make_task(MODEL, **TASK).init(jax.random.key(0))
    averaged = {
        path: x * 0 + 0.01 if path == "embed/table" else x
        for path, x in functional.flatten(params).items()
    }
    with checkpoints.Checkpointer(workdir) as saver:
        saver.save(1, {"params": params, "ema": averaged}, {"config": config})
    return workdir


def test_a_language_model_to_take_away(run, tmp_path, monkeypatch):
    folder = tmp_path / "assets" / "lvm_small"
    (digest,) = export_run.export(str(run), str(folder)).values()
    content = (folder / "params.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    config = json.loads((folder / "config.json").read_text())
    assert config["system"] == "lvm" and config["task"].items() >= TASK.items()

    model = vlm_jax.load("lvm", str(folder))
    assert model.lead_ids == (1024,) and model.context_images == 4 and model.tokenizer.side == 8
    assert np.allclose(model.params["embed"]["table"], 0.01)  # the average
    for here, there in zip(
        jax.tree.leaves(model.params), jax.tree.leaves(vlm_jax.load("lvm", str(run)).params)
    ):
        np.testing.assert_array_equal(here, there)  # and not a bit less

    monkeypatch.setattr(shipped.importlib.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(
        "vlm_jax.encoders.image_tokenizer.ImageTokenizer.load", lambda *_, **__: model.tokenizer
    )
    again = vlm_jax.load("lvm", "small")
    prompt = [np.arange(8, dtype=np.int32).reshape(2, 4)]
    sampler = sampling.Sampler(temperature=0.0, suppress_from=1024)
    np.testing.assert_array_equal(
        model.continue_ids(prompt, 1, sampler=sampler),
        again.continue_ids(prompt, 1, sampler=sampler),
    )
    # And a run can start from it.
    task = lvm.make_task(MODEL, **TASK)
    assert np.allclose(lvm.load_upstream("small", task)["embed"]["table"], 0.01)


def test_a_labeller_needs_its_tokenizer(make_run, golden_nxtp, tmp_path):
    workdir, _, params = make_run("nxtp")
    with pytest.raises(ValueError, match="no tokenizer is named"):
        export_run.export(str(workdir), str(tmp_path / "out"))
    words = str(golden_nxtp / "tokenizer.model")
    with pytest.raises(ValueError, match="the decoder 66; give the tokenizer"):
        export_run.export(str(workdir), str(tmp_path / "out"), tokenizer=words)


def test_a_folder_of_another_system_is_refused(run, tmp_path):
    folder = tmp_path / "export"
    export_run.export(str(run), str(folder))
    with pytest.raises(ValueError, match="of the system 'lvm', not of 'nxtp'"):
        vlm_jax.load("nxtp", str(folder))


# ---- the command -------------------------------------------------------------------------------


def command(workdir, target, *flags):
    return export_run.main([f"--workdir={workdir}", f"--to={target}", *flags])


def test_the_exported_tokenizer_is_that_of_the_run(make_run, tmp_path, capsys):
    workdir, task, params = make_run("vqgan")
    assert command(workdir, tmp_path / "out") == 0
    assert capsys.readouterr().out.endswith("  params.safetensors\n")
    cfg, made = vqgan.load(tmp_path / "out")
    assert cfg == task.cfg
    jax.tree.map(np.testing.assert_array_equal, made, vqgan_model.tokenizer_part(params))


def test_what_is_no_such_run_is_one_line(make_run, tmp_path, capsys):
    def line(workdir):
        assert command(workdir, tmp_path / "out") == 1
        captured = capsys.readouterr()
        assert captured.out == "" and not (tmp_path / "out").exists()
        (text,) = [x for x in captured.err.splitlines() if not x.startswith("checkpoints: ")]
        return text

    assert "no such checkpoint" in line(tmp_path / "nowhere")
    assert "no good checkpoint" in line(tmp_path)
    workdir, *_ = make_run("nxtp")
    assert "no tokenizer is named" in line(workdir)
    (workdir / "checkpoints" / "7" / "meta.json").write_text("{")
    assert "no good checkpoint" in line(workdir)


def test_values_too_large_for_the_file_are_named(make_run, tmp_path, capsys):
    workdir, *_ = make_run(
        "vqgan",
        quant_conv={
            "kernel": np.ones((1, 1, 32, 8), np.float32),
            "bias": np.full(8, 1e5, np.float32),
        },
    )
    assert command(workdir, tmp_path / "out", "--dtype=float16") == 1
    assert "quant_conv/bias: 8 of 8 values are too large for float16" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_nothing_is_overwritten(make_run, tmp_path, capsys):
    workdir, *_ = make_run("vqgan")
    (tmp_path / "params.safetensors").write_text("mine")
    assert command(workdir, tmp_path) == 1
    assert "already holds params.safetensors" in capsys.readouterr().err
    assert (tmp_path / "params.safetensors").read_text() == "mine"
