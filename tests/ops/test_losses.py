import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops import losses


def test_by_hand():
    # Two rows; p(target) = 1/2 and 1/4, then 3/4; the last token carries no loss.
    logits = jnp.log(jnp.array([[[0.5, 0.5], [0.75, 0.25]], [[0.25, 0.75], [0.5, 0.5]]]))
    targets = jnp.array([[1, 1], [1, 0]])
    weights = jnp.array([[1.0, 1.0], [1.0, 0.0]])
    first, second, third = math.log(2), math.log(4), -math.log(0.75)
    loss, metrics = losses.cross_entropy(logits, targets, weights, mean="token")
    assert loss == pytest.approx((first + second + third) / 3, abs=1e-6)
    assert metrics["tokens"] == 3
    assert metrics["accuracy"] == pytest.approx(1 / 3)  # a tie goes to the lower id
    loss, metrics = losses.cross_entropy(logits, targets, weights, mean="row")
    assert loss == pytest.approx(((first + second) / 2 + third) / 2, abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(1 / 2)


def test_factors_drawn_in_the_docstring():
    weights = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0]])
    row = losses.token_factors(weights, "row")
    np.testing.assert_allclose(row, [[1 / 4, 1 / 4, 0, 0], [1 / 6, 1 / 6, 1 / 6, 0]], rtol=1e-6)
    token = losses.token_factors(weights, "token")
    np.testing.assert_allclose(token, weights / 5, rtol=1e-6)
    empty = losses.token_factors(jnp.array([[0, 0], [1, 1]]), "row")
    np.testing.assert_allclose(empty, [[0, 0], [1 / 4, 1 / 4]])
    assert losses.token_factors(jnp.zeros((2, 2)), "token").sum() == 0
    with pytest.raises(ValueError, match="'batch'"):
        losses.token_factors(weights, "batch")


@pytest.mark.parametrize("name", ["masked", "full", "zero_row"])
def test_reference_losses(golden_lvm, name):
    io = np.load(golden_lvm / "io.npz")
    weights = {
        "masked": io["loss.masks"],
        "full": np.ones_like(io["loss.masks"]),
        "zero_row": io["loss.masks"] * (np.arange(3) != 2)[:, None],
    }[name]
    loss, metrics = losses.cross_entropy(io["lm.logits"], io["loss.targets"], weights, mean="row")
    np.testing.assert_allclose(loss, io[f"loss.{name}"][0], rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], io[f"loss.{name}_accuracy"][0], atol=1e-6)


@pytest.mark.parametrize("mean", ["row", "token"])
@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_chunked_equals_plain(mean, chunk):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 11, 8)).astype(np.float32)
    head = rng.normal(size=(8, 13)).astype(np.float32)
    targets = rng.integers(0, 13, (3, 11))
    weights = (rng.uniform(size=(3, 11)) < 0.7).astype(np.float32)
    weights[1] = 0

    def plain(hidden, head):
        return losses.cross_entropy(hidden @ head, targets, weights, mean=mean)

    def chunked(hidden, head):
        return losses.chunked_cross_entropy(hidden, head, targets, weights, mean=mean, chunk=chunk)

    both = [jax.value_and_grad(f, (0, 1), has_aux=True) for f in (plain, chunked)]
    grads, evaluated = jax.jit(lambda *x: ([f(*x) for f in both], chunked(*x)[0]))(hidden, head)
    ((loss, want_metrics), want), ((_, got_metrics), got) = grads
    assert abs(loss - evaluated) < 1e-6  # without a gradient another branch runs
    for name in want_metrics:
        np.testing.assert_allclose(got_metrics[name], want_metrics[name], rtol=1e-6, atol=1e-6)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_chunked_scales_its_gradient():
    hidden, head = jnp.ones((1, 4, 2)), jnp.array([[1.0, 2.0, 0.0], [0.5, 0.0, 1.0]])
    targets, weights = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4))

    def f(h):
        return losses.chunked_cross_entropy(hidden, h, targets, weights)[0]

    np.testing.assert_allclose(jax.grad(lambda h: 3 * f(h))(head), 3 * jax.grad(f)(head))


def test_chunked_holds_no_full_logits():
    b, t, d, v = 1, 512, 4, 1000
    shapes = [(b, t, d), (d, v)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(hidden, head):
        zeros = jnp.zeros((b, t), jnp.int32)
        return losses.chunked_cross_entropy(hidden, head, zeros, zeros + 1, chunk=16)[0]

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*args))
    assert f"[{b},16,{v}]" in text and f"{t},{v}" not in text
    with pytest.raises(ValueError, match="got 0"):
        losses.chunked_cross_entropy(
            jnp.ones((1, 1, 1)), jnp.ones((1, 1)), jnp.zeros((1, 1), int), jnp.ones((1, 1)), chunk=0
        )
