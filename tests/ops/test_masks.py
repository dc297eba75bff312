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


def test_prefix():
    np.testing.assert_array_equal(
        masks.prefix(4, 2),
        drawn("""
            1 1 . .
            1 1 . .
            1 1 1 .
            1 1 1 1"""),
    )
    np.testing.assert_array_equal(masks.prefix(2, 2, 5, offset=3), masks.causal(2, 5, offset=3))


#                   i  i  IM BO P  ar so fa ,  ca ,  x  y  pad
RELEASED = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0, 0]])
TWO_LABELS = drawn("""
    1 1 . . . . . . . . . . . .
    1 1 . . . . . . . . . . . .
    1 1 1 . . . . . . . . . . .
    1 1 1 1 . . . . . . . . . .
    1 1 1 1 1 . . . . . . . . .
    1 1 1 1 1 1 . . . . . . . .
    1 1 1 1 1 1 1 . . . . . . .
    1 1 1 1 1 1 1 1 . . . . . .
    1 1 1 1 1 1 1 1 1 . . . . .
    1 1 1 1 1 1 . . . 1 . . . .
    1 1 1 1 1 1 . . . 1 1 . . .
    1 1 1 1 1 1 . . . . . . . .
    1 1 1 1 1 1 . . . . . . . .
    1 1 1 1 1 1 . . . . . . . .""")


def test_labels_in_the_released_form():
    np.testing.assert_array_equal(masks.labels(jnp.array(RELEASED), 2)[0], TWO_LABELS)


def test_labels_in_the_closed_form():
    segments = RELEASED.copy()
    segments[0, 11:13] = 4
    expected = TWO_LABELS.copy()
    expected[11, 11] = expected[12, 11] = expected[12, 12] = True
    np.testing.assert_array_equal(masks.labels(jnp.array(segments), 2)[0], expected)


def test_sequential_labels():
    segments = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4]] * 3)
    segments[1, 11:] = 4
    made = masks.sequential_labels(jnp.array(segments), jnp.array([2, 1, 0]), 2)
    late = drawn("""
        1 1 1 1 1 . . . . 1 . . .
        1 1 1 1 1 . . . . 1 1 . .
        1 1 1 1 1 . . . . 1 1 1 .
        1 1 1 1 1 . . . . 1 1 1 1""")
    plain = np.asarray(masks.prefix(13, 2))
    np.testing.assert_array_equal(made[0], np.concatenate([plain[:9], late]))
    # The first label stays visible until the second is complete.
    np.testing.assert_array_equal(made[1], plain)
    np.testing.assert_array_equal(made[2], plain)
