"""Two real processes joined by jax.distributed do what one process does."""

import collections
import json
import re
import signal

import pytest
import tiny_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return tiny_system.write_numbers(tmp_path_factory.mktemp("data") / "numbers.jsonl")


@pytest.fixture(scope="module")
def alone(numbers, tmp_path_factory):
    """metrics.jsonl of one process with one device, 30 steps."""
    workdir = tmp_path_factory.mktemp("alone")
    tiny_system.train(workdir, numbers, _steps(30))
    return tiny_system.metrics(workdir)


def _steps(number):
    # The recipe's schedule does not depend on the number of steps.
    return f"--config.train.steps={number}"


def _train_pair(workdir, numbers, *overrides):
    pair = tiny_system.start_pair(workdir, numbers, *overrides)
    ends = [run.finish() for run in pair]
    said = "\n".join(run.said() for run in pair)
    assert ends == [0, 0], said
    return said


def _assert_close(lines, expected):
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_two_processes_give_the_metrics_of_one(numbers, alone, tmp_path):
    said = _train_pair(tmp_path, numbers, _steps(30))
    assert said.count("over 2 cpu") == 1 and "2 processes" in said
    _assert_close(tiny_system.metrics(tmp_path), alone)


def test_two_processes_evaluate_as_one_and_read_every_record_once(numbers, tmp_path):
    tiny_system.train(tmp_path, numbers, _steps(5))
    (tmp_path / "log").mkdir()
    evaluate = ("--mode=evaluate", "--config.evals.held_out.batch_size=4", _steps(5))
    tiny_system.train(tmp_path, numbers, *evaluate)
    _train_pair(tmp_path, numbers, *evaluate, f"--config.formatter.log={tmp_path / 'log'}")
    lines = (tmp_path / "evaluation.jsonl").read_text().splitlines()
    one, two = map(json.loads, lines[-2:])
    scores = [key for key in one if key.startswith("eval/held_out/")]
    assert scores and [two[key] for key in scores] == pytest.approx([one[key] for key in scores])
    assert two["eval/held_out/rows"] == 64
    logs = [path.read_text().splitlines() for path in (tmp_path / "log").iterdir()]
    assert len(logs) == 2 and len(logs[0]) == len(logs[1])
    # Both look at the first batch of four before they begin; every other record has one reader.
    reads = sorted(collections.Counter(line for log in logs for line in log).values())
    assert reads[:60] == [1] * 60 and len(reads) == 64


def test_one_process_two_and_one_again(numbers, alone, tmp_path):
    tiny_system.train(tmp_path, numbers, _steps(10))
    said = _train_pair(tmp_path, numbers, _steps(20))
    assert said.count("resuming from step 10 of 20") == 1
    said = tiny_system.train(tmp_path, numbers, _steps(30))
    assert said.count("resuming from step 20 of 30") == 1
    _assert_close(tiny_system.metrics(tmp_path), alone)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_the_rest_resumes(numbers, alone, tmp_path, killed):
    pair = tiny_system.start_pair(tmp_path, numbers, _steps(30), "--config.formatter.sleep_s=0.05")
    pair[0].wait_until((tmp_path / "checkpoints" / "5" / "COMMIT.json").exists)
    pair[killed].stop(signal.SIGKILL)
    other = pair[1 - killed]
    assert other.finish(60.0) == 3, other.said()
    assert f"error: process {killed} (host" in other.said() and "killed" in other.said()
    assert "Traceback" not in other.said() and "stack trace" not in other.said()
    pair[killed].finish()
    assert "resuming from step" in tiny_system.train(tmp_path, numbers, _steps(30))
    _assert_close(tiny_system.metrics(tmp_path), alone)


def test_an_error_of_one_process_ends_the_other_before_the_first_update(numbers, tmp_path):
    pair = tiny_system.start_pair(tmp_path, [numbers, tmp_path / "absent.jsonl"], _steps(30))
    assert [run.finish(120.0) for run in pair] == [3, 2], "\n".join(run.said() for run in pair)
    assert "error: process 1 (host" in pair[0].said()
    for run in pair:
        assert "absent.jsonl" in run.said() and "Traceback" not in run.said()


def test_one_that_never_comes(numbers, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_JAX_JOIN_TIMEOUT_S", "5")
    first, second = tiny_system.start_pair(tmp_path, numbers, _steps(30))
    second.stop(signal.SIGKILL)
    assert first.finish(60.0) == 3, first.said()
    assert "process 1" in first.said() and "Traceback" not in first.said()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_either_process_saves_once_and_ends_both(numbers, alone, tmp_path, told):
    pair = tiny_system.start_pair(tmp_path, numbers, _steps(30), "--config.formatter.sleep_s=0.05")
    pair[0].wait_for_step(7)
    pair[told].stop(signal.SIGTERM)
    ends = [run.finish() for run in pair]
    said = "\n".join(run.said() for run in pair)
    assert ends == [0, 0], said
    (step,) = re.findall(r"saved step (\d+)", said)
    assert 7 <= int(step) < 30
    assert (tmp_path / "checkpoints" / step / "COMMIT.json").exists()
    if told == 0:
        assert f"resuming from step {step} of 30" in tiny_system.train(
            tmp_path, numbers, _steps(30)
        )
        _assert_close(tiny_system.metrics(tmp_path), alone)
