"""Stopped, killed or damaged, a run continues as if nothing had happened: bit for bit on a CPU."""

import random
import re
import shutil
import signal
import time

import pytest
import tiny_system

pytestmark = pytest.mark.slow

_SLOWLY = "--config.formatter.sleep_s=0.02"  # a run that is to be stopped must not be over first


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return tiny_system.write_numbers(tmp_path_factory.mktemp("data") / "numbers.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(numbers, tmp_path_factory):
    """metrics.jsonl of a run that was never stopped."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    tiny_system.train(workdir, numbers)
    lines = tiny_system.metrics(workdir)
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, 41))
    assert [line["step"] for line in lines if "train/loss" not in line] == [10, 20, 30, 40]
    assert lines[-1]["eval/held_out/perplexity"] < 0.8 * tiny_system.VOCAB
    return lines


@pytest.fixture(scope="module")
def stopped(numbers, tmp_path_factory):
    """(workdir, step) of a run ended by SIGTERM somewhere after step 17."""
    workdir = tmp_path_factory.mktemp("stopped")
    run = tiny_system.Run(workdir, numbers, _SLOWLY)
    run.wait_for_step(17)
    run.stop(signal.SIGTERM)
    assert run.finish() == 0, run.said()
    step = int(re.search(r"saved step (\d+)", run.said()).group(1))
    assert 17 <= step < 40
    assert (workdir / "checkpoints" / str(step) / "COMMIT.json").exists()
    return workdir, step


def _copy(stopped, tmp_path):
    workdir, step = stopped
    shutil.copytree(workdir, tmp_path / "run")
    return tmp_path / "run", step


def test_after_sigterm(numbers, uninterrupted, stopped, tmp_path):
    workdir, step = _copy(stopped, tmp_path)
    said = tiny_system.train(workdir, numbers)
    assert f"resuming from step {step} of 40" in said
    assert tiny_system.metrics(workdir) == uninterrupted
    # Told once more, a finished run adds nothing.
    tiny_system.train(workdir, numbers)
    assert tiny_system.metrics(workdir) == uninterrupted


def test_stopping_at_the_step_of_an_evaluation_loses_no_line(numbers, uninterrupted, tmp_path):
    every_step = "--config.evals.held_out.every=1"
    run = tiny_system.Run(tmp_path, numbers, _SLOWLY, every_step)
    run.wait_for_step(3)
    run.stop(signal.SIGTERM)
    assert run.finish() == 0, run.said()
    tiny_system.train(tmp_path, numbers, every_step)
    lines = tiny_system.metrics(tmp_path)
    assert [line["step"] for line in lines] == [step for step in range(1, 41) for _ in range(2)]
    assert lines[0::2] == [line for line in uninterrupted if "train/loss" in line]
    evaluations = [line for line in uninterrupted if "train/loss" not in line]
    assert lines[19::20] == evaluations and "eval/held_out/perplexity" in evaluations[0]


def _unfinished_saves(workdir):
    steps = [path for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
    return [path for path in steps if not (path / "COMMIT.json").exists()]


def test_after_kill_at_random_moments(numbers, uninterrupted, tmp_path):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    reached = 0
    for kill in range(3):
        run = tiny_system.Run(tmp_path, numbers, _SLOWLY)
        run.wait_for_step(reached + rng.randint(2, 10))
        if kill == 1:  # while a checkpoint is being written
            run.wait_until(lambda: _unfinished_saves(tmp_path), may_end=True)
        else:
            time.sleep(rng.random() / 5)
        run.stop(signal.SIGKILL)
        assert run.finish() in (-signal.SIGKILL, 0)  # 0: it was faster
        committed = [path.parent.name for path in tmp_path.glob("checkpoints/*/COMMIT.json")]
        reached = max((int(step) for step in committed if step.isdigit()), default=0)
    said = tiny_system.train(tmp_path, numbers)
    assert not reached or f"resuming from step {reached} of 40" in said
    assert tiny_system.metrics(tmp_path) == uninterrupted


def test_damaged_checkpoints_are_skipped(numbers, uninterrupted, stopped, tmp_path):
    workdir, step = _copy(stopped, tmp_path)
    folder = workdir / "checkpoints"
    good = sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)
    newest, second, third = good[:3]
    assert newest == step

    def largest(step):
        files = [p for p in (folder / str(step) / "state").rglob("*") if p.is_file()]
        return max(files, key=lambda path: path.stat().st_size)

    (folder / "39").mkdir()
    content = largest(newest).read_bytes()
    largest(newest).write_bytes(content[: len(content) // 2])
    content = bytearray(largest(second).read_bytes())
    content[len(content) // 2] ^= 0x10
    largest(second).write_bytes(content)

    said = tiny_system.train(workdir, numbers)
    for bad, why in ((39, "is empty"), (newest, "was cut off"), (second, "digest differs")):
        (line,) = [x for x in said.splitlines() if f"step {bad} is not used" in x]
        assert why in line
    assert f"resuming from step {third} of 40" in said
    assert len(said.splitlines()) < 200
    assert tiny_system.metrics(workdir) == uninterrupted


def test_another_model_in_the_workdir_is_refused(numbers, stopped, tmp_path):
    workdir, step = _copy(stopped, tmp_path)
    run = tiny_system.Run(workdir, numbers, "--config.model.width=32")
    assert run.finish() == 2, run.said()
    said = run.said()
    assert "params/embed/table: checkpoint float32[32, 16], model float32[32, 32]" in said
    assert "Traceback" not in said


def test_a_full_disk_stops_the_run_and_room_continues_it(numbers, uninterrupted, small_disk):
    run = tiny_system.Run(small_disk, numbers, _SLOWLY)
    run.wait_until(lambda: list(small_disk.glob("checkpoints/*/COMMIT.json")))
    filler = small_disk / "filler"
    room = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(room - 300_000))  # enough for metrics.jsonl, not for a checkpoint
    assert run.finish() == 2, run.said()
    (said,) = [line for line in run.said().splitlines() if line.startswith("error: ")]
    assert "the disk is full" in said and "bytes are free" in said and "to resume" in said
    assert "Traceback" not in run.said()
    filler.unlink()
    assert "resuming from step" in tiny_system.train(small_disk, numbers)
    assert tiny_system.metrics(small_disk) == uninterrupted
