"""Guards: when they trip, what they say, and that they stop the program."""

import pytest

from tests import tiny_system
from vlm_jax.program import config as config_lib
from vlm_jax.program import guards, run, train


def trips_at(values, **fields):
    """(step, message) at which a guard on these values of steps 1, 2, ... trips."""
    (guard,) = guards.make({"usage": dict(metric="codes", **fields)})
    for step, value in enumerate(values, 1):
        if message := guard.check(step, {"codes": value, "loss": 0.0}):
            return step, message
    return None, ""


def test_only_after_patience_in_a_row():
    step, message = trips_at([1, 9, 1, 1, 9, 1, 1, 1, 1], min=5.0, patience=3, reason="Collapse")
    assert step == 8
    assert message == (
        "guard 'usage': codes=1 at step 8, under min=5 for 3 updates in a row. Collapse"
    )
    assert trips_at([1, 1, 9] * 5, min=5.0, patience=3)[0] is None


def test_not_before_its_first_update():
    assert trips_at([1] * 10, min=5.0, after=6, patience=2)[0] == 7
    step, message = trips_at([6.25], max=5.0, patience=1)
    assert step == 1 and "over max=5 for one update" in message


def test_limits_themselves_are_allowed_and_nan_is_not():
    assert trips_at([5.0] * 5, min=5.0, max=5.0, patience=1)[0] is None
    assert trips_at([float("nan")], max=5.0, patience=1)[0] == 1


def test_what_is_not_finite_needs_no_recipe():
    sound = {"loss": 2.0, "optim/grad_norm": 1e30, "optim/param_norm": 3.0, "other": float("nan")}
    assert guards.not_finite(sound) == ""
    assert guards.not_finite({"loss": 2.0}) == ""  # an update of another kind
    for name in ("loss", "optim/grad_norm", "optim/param_norm"):
        for value in (float("nan"), float("inf"), -float("inf")):
            assert guards.not_finite(sound | {name: value}) == name


def test_bad_settings_are_named():
    with pytest.raises(config_lib.ConfigError, match="train.guards.a: neither min nor max"):
        guards.make({"a": dict(metric="loss")})
    with pytest.raises(config_lib.ConfigError, match="unknown key train.guards.a.maximum"):
        guards.make({"a": dict(metric="loss", maximum=3.0)})
    with pytest.raises(config_lib.ConfigError, match="train.guards.a: min=nan"):
        guards.make({"a": dict(metric="loss", min=float("nan"))})
    with pytest.raises(config_lib.ConfigError, match="train.guards.a=3 is not a section"):
        guards.make({"a": 3})
    with pytest.raises(config_lib.ConfigError, match="patience=0"):
        train.TrainConfig(
            steps=1, batch_size=1, guards={"a": dict(metric="loss", max=1.0, patience=0)}
        )


@pytest.mark.slow
def test_a_tripped_guard_stops_the_run(tmp_path):
    numbers = tiny_system.write_numbers(tmp_path / "numbers.jsonl")
    c = tiny_system.get_config()
    c.data.mixture.lines.path = c.evals.held_out.data.mixture.lines.path = str(numbers)
    c.mesh = dict(data=8, fsdp=1, tensor=1)
    c.train.steps = 10
    # The tiny model starts at log(32) = 3.5 and stays above 1 for long.
    c.train.guards = dict(high=dict(metric="loss", max=1.0, patience=4, reason="Too high."))
    with pytest.raises(train.TrainingStopped) as stopped:
        run.run(c, tmp_path / "run")
    message = str(stopped.value)
    assert "guard 'high': loss=" in message and "at step 4, over max=1" in message
    assert "Too high. Checkpoints of earlier steps are in" in message
    c.train.guards = dict(high=dict(metric="los", max=1.0))
    with pytest.raises(config_lib.ConfigError, match="did you mean 'loss'"):
        run.run(c, tmp_path / "other")
