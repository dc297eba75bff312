import jax.numpy as jnp
import numpy as np

from vlm_jax.ops import masks


def drawn(text):
    return np.array([[c == "1" for c in row.split()] for row in text.strip().splitlines()])


def test_causal():
    np.testing.assert_array_equal(
        masks.causal(3),
        drawn("""
            1 . .
            1 1 .
            1 1 1"""),
    )


def test_causal_behind_two_cached_tokens():
    np.testing.assert_array_equal(
        masks.causal(3, 6, offset=2),
        drawn("""
            1 1 1 . . .
            1 1 1 1 . .
            1 1 1 1 1 ."""),
    )


def test_segments():
    segments = jnp.array([[1, 1, 2, 0]])
    np.testing.assert_array_equal(
        masks.segments(segments, segments)[0],
        drawn("""
            1 1 . .
            1 1 . .
            . . 1 .
            . . . 1"""),
    )


def test_cache_with_left_padding():
    valid = jnp.array([[0, 1, 1, 1, 1, 0]], bool)
    np.testing.assert_array_equal(
        masks.cache(valid, 2, 3)[0],
        drawn("""
            . 1 1 1 . .
            . 1 1 1 1 ."""),
    )
