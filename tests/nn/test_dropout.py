"""What is dropped, and what the rest becomes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn import dropout


def test_rate_and_mean():
    x = jnp.full((200, 300), 2.0)
    out = np.asarray(dropout.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, np.float32(2 / 0.75)}
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert out.mean() == pytest.approx(2.0, rel=0.01)
    assert not np.array_equal(out, dropout.dropout(x, 0.25, jax.random.key(1)))


def test_without_a_key_nothing_is_dropped():
    x = jnp.ones((2, 3))
    assert dropout.dropout(x, 0.5, None) is x
    assert dropout.dropout(x, 0.0, jax.random.key(0)) is x


def test_a_draw_that_tokens_share():
    out = np.asarray(dropout.dropout(jnp.ones((4, 50, 60)), 0.5, jax.random.key(0), shared=(-2,)))
    assert (out == out[:, :1]).all()
    assert 0.3 < (out[:, 0] == 0).mean() < 0.7
    assert not (out[0] == out[1]).all()


def test_stochastic_depth_is_by_row():
    out = np.asarray(
        dropout.drop_path(jnp.ones((400, 3, 4), jnp.bfloat16), 0.3, jax.random.key(0)), np.float32
    )
    rows = out.reshape(400, -1)
    assert (rows == rows[:, :1]).all()
    assert (rows[:, 0] == 0).mean() == pytest.approx(0.3, abs=0.07)
    assert rows.max() == pytest.approx(1 / 0.7, rel=0.01)


def test_gradients_pass_through_what_is_kept():
    x, key = jnp.arange(1.0, 101.0), jax.random.key(0)
    out, grad = jax.value_and_grad(lambda x: dropout.dropout(x, 0.5, key).sum())(x)
    kept = np.asarray(grad) > 0
    assert 0 < kept.sum() < 100 and out == pytest.approx(2 * float(x[kept].sum()))


def test_rates():
    assert dropout.rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert dropout.rates(0.3, 1) == [0.0]
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            dropout.dropout(jnp.ones(3), rate, jax.random.key(0))
