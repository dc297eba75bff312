import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops import rope


@pytest.mark.parametrize("width", [16, 128])
def test_reference_tables(golden_lvm, width):
    io = np.load(golden_lvm / "io.npz")
    cos, sin = rope.table(io["rope.positions"], width)
    np.testing.assert_allclose(cos, io[f"rope.fp32_hd{width}_cos"], atol=2e-4)
    np.testing.assert_allclose(sin, io[f"rope.fp32_hd{width}_sin"], atol=2e-4)
    # Float64 truth: the angles are exact to float32 rounding up to the end of the context.
    exact = io["rope.positions"][:, None] / 1e4 ** (np.arange(0, width, 2) / width)
    np.testing.assert_allclose(cos, np.cos(exact), atol=1e-3)


def test_quarter_turn_pairs_first_half_with_second():
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    zero, one = jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2))
    np.testing.assert_array_equal(rope.rotate(x, zero, one)[0, 0, 0], [-3, -4, 1, 2])
    np.testing.assert_array_equal(rope.rotate(x, one, zero), x)


def test_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):

        def at(x, p):
            return rope.rotate(x, *rope.table(jnp.array([[p]]), 8))

        return float((at(q, i) * at(k, j)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_keeps_dtype_and_needs_even_width():
    x = jnp.ones((1, 3, 2, 4), jnp.bfloat16)
    assert rope.rotate(x, *rope.table(jnp.arange(3)[None], 4)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="got 5"):
        rope.table(jnp.arange(3), 5)
