"""How the program ends when it is told to before its first update, or is started twice."""

import signal

import jax
import pytest
import tiny_system

from vlm_jax.machines import hardware
from vlm_jax.program import config, requirements, workdir_lock


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return tiny_system.write_numbers(tmp_path_factory.mktemp("data") / "numbers.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_start_up_ends_at_once(numbers, tmp_path, number, status):
    # A record takes so long that the first update is not reached.
    run = tiny_system.Run(tmp_path, numbers, "--config.formatter.sleep_s=100")
    run.wait_until((tmp_path / workdir_lock.FILE).exists)
    run.stop(number)
    assert run.finish(60.0) == status
    assert run.said().splitlines()[-1].startswith(f"stopped by {number.name}:")
    assert "Traceback" not in run.said()
    assert {path.name for path in tmp_path.iterdir()} <= {"stderr0.txt", "checkpoints"}


@pytest.mark.slow
def test_a_second_run_ends_at_once_and_touches_nothing(numbers, tmp_path):
    first = tiny_system.Run(tmp_path, numbers, "--config.formatter.sleep_s=0.05")
    first.wait_for_step(2)
    second = tiny_system.Run(tmp_path, numbers)
    assert second.finish() == 2
    assert "is in use by another run: host" in second.said() and "Traceback" not in second.said()
    assert "--workdir" in second.said() and first.running()
    first.stop()
    assert first.finish() == 0, first.said()
    steps = [x["step"] for x in tiny_system.metrics(tmp_path) if "train/loss" in x]
    assert steps == list(range(1, len(steps) + 1)) and not (tmp_path / workdir_lock.FILE).exists()


@pytest.mark.parametrize("error", [RuntimeError("Unable to start 'cuda'\nmore"), AssertionError()])
def test_devices_that_are_not_there(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(hardware.jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(config.ConfigError, match="JAX_PLATFORMS='cuda': .* Unset") as raised:
        hardware.require_devices()
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_transfer_guard", "disallow"),
    ],
)
def test_settings_of_jax_that_forbid_what_every_run_does(name, value):
    hardware.require_devices()
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(config.ConfigError, match=f"{name}={value}.*unset {name.upper()}"):
            hardware.require_devices()
    finally:
        jax.config.update(name, before)


def test_versions_that_do_not_fit():
    assert requirements.unmet() == []
    wanted = ["numpy>=1.0", "numpy>=999.1", "no-such-package-here>=1", "av>=12; extra == 'data'"]
    old, missing = requirements.unmet(wanted)
    assert old.startswith("numpy ") and old.endswith("needs >=999.1")
    assert missing == "no-such-package-here is not installed, needs >=1"
    text = requirements.explain(AttributeError("jax has no attribute 'x'\nmore"))
    assert "has no attribute 'x'" in text and "constraints.txt" in text
    assert len(text.splitlines()) == 1
