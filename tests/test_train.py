"""The update: what it does to learned, frozen and averaged parameters, and in which order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.program import optim, run, train


@dataclasses.dataclass(frozen=True)
class Line:
    """y = a * x + b, squared error."""

    sharding_rules = ()

    def init(self, rng):
        return {"a": {"w": jnp.ones(())}, "b": {"w": jnp.zeros(())}}

    def loss(self, params, batch, rng):
        error = params["a"]["w"] * batch["x"] + params["b"]["w"] - batch["y"]
        return jnp.mean(error**2), {"noise": jax.random.normal(rng)}


def steps(num, batch=None, accumulate=1, **settings):
    settings = dict(lr=0.1, schedule="constant", clip_norm=0.0) | settings
    recipe = run.Recipe(
        system="line",
        model={},
        data=None,
        train=train.TrainConfig(steps=10, batch_size=4, accumulate=accumulate),
        optim=optim.OptimConfig(**settings),
    )
    optimizer = optim.make_optimizer(recipe.optim, 10)
    update = jax.jit(train.make_train_step(Line(), optimizer, recipe))
    state = train.init_state(Line(), optimizer, recipe, jax.random.key(0))
    batch = batch or {"x": jnp.arange(4.0), "y": 3 * jnp.arange(4.0) + 1}
    history = []
    for _ in range(num):
        state, metrics = update(state, batch, jax.random.key(1))
        history.append((state, metrics))
    return history


def test_metrics_are_of_the_parameters_before_the_update():
    (_, first), (_, second) = steps(2)
    # Errors of y = x against 3x + 1 at 0..3: 1, 3, 5, 7.
    assert float(first["loss"]) == 21.0
    assert float(second["loss"]) < 21.0
    assert float(first["optim/lr"]) == pytest.approx(0.1)
    # d loss/da = mean(2 e x) = -2 (3 + 10 + 21) / 4, d loss/db = -2 * 16 / 4.
    assert float(first["optim/grad_norm"]) == pytest.approx(np.hypot(17, 8))


def test_frozen_parameters_stay_and_have_no_moments():
    state, _ = steps(3, trainable="^a/")[-1]
    assert float(state["params"]["b"]["w"]) == 0.0
    assert float(state["params"]["a"]["w"]) != 1.0
    paths = [str(path) for path, _ in jax.tree_util.tree_flatten_with_path(state["opt_state"])[0]]
    assert any("a/w" in path for path in paths) and not any("b/w" in path for path in paths)


def test_moving_average_of_what_learns():
    history = steps(3, ema=0.9, trainable="^a/")
    average = 1.0
    for state, _ in history:
        average = 0.9 * average + 0.1 * float(state["params"]["a"]["w"])
        assert set(state["ema"]) == {"a/w"}
        assert float(state["ema"]["a/w"]) == pytest.approx(average, rel=1e-6)


def test_accumulated_parts_give_the_update_of_the_whole():
    whole, parts = steps(3)[-1], steps(3, accumulate=2)[-1]
    for a, b in zip(jax.tree.leaves(whole[0]["params"]), jax.tree.leaves(parts[0]["params"])):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert float(whole[1]["loss"]) == pytest.approx(float(parts[1]["loss"]))


def test_every_step_has_its_own_key():
    values = [float(metrics["noise"]) for _, metrics in steps(3)]
    assert len(set(values)) == 3


def test_clipping_bounds_the_gradient_not_its_report():
    state, metrics = steps(1, clip_norm=1e-3)[-1]
    assert float(metrics["optim/grad_norm"]) > 1
    # Adam's first step is lr whatever the scale; the second moment shows the clipped gradient.
    nu = [x for x in jax.tree.leaves(state["opt_state"]) if x.shape == () and 0 < float(x) < 1e-6]
    assert nu
