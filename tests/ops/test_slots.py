"""Slots: rows do not depend on each other, empty slots change nothing, there and back."""

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.ops import slots

MARKS = np.array([[0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
VALUES = np.arange(1, 10, dtype=np.float32).reshape(3, 3, 1) * np.array([1.0, -1.0], np.float32)


def test_put_counts_from_the_left_of_each_row():
    x = np.full((3, 6, 2), 0.5, np.float32)
    made = np.asarray(slots.put(jnp.asarray(x), jnp.asarray(MARKS), jnp.asarray(VALUES)))
    expected = x.copy()
    expected[0, 2], expected[0, 4] = VALUES[0, 0], VALUES[0, 1]
    expected[1, :3] = VALUES[1]  # the fourth place has no slot and keeps its vector
    np.testing.assert_array_equal(made, expected)


def test_empty_slots_keep_what_was_there():
    x = np.full((3, 6, 2), 0.5, np.float32)
    valid = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 1]], bool)
    made = np.asarray(slots.put(x, MARKS, VALUES, valid))
    expected = x.copy()
    expected[0, 4] = VALUES[0, 1]
    expected[1, 0], expected[1, 2] = VALUES[1, 0], VALUES[1, 2]
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(slots.put(x, MARKS, VALUES[:, :0]), x)


def test_put_keeps_the_dtype_of_what_it_changes():
    made = slots.put(jnp.zeros((3, 6, 2), jnp.bfloat16), MARKS, VALUES)
    assert made.dtype == jnp.bfloat16


def test_take_is_the_inverse():
    x = np.random.default_rng(0).normal(size=(3, 6, 2)).astype(np.float32)
    values, valid = slots.take(jnp.asarray(x), jnp.asarray(MARKS), 3)
    np.testing.assert_array_equal(valid, [[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(values[0, :2], x[0, [2, 4]])
    np.testing.assert_array_equal(values[1], x[1, :3])
    assert not np.any(values[2]) and not np.any(values[0, 2])
    back = slots.put(jnp.zeros_like(x), MARKS, values, valid)
    np.testing.assert_array_equal(back[0, 2], x[0, 2])


def test_take_more_slots_than_places():
    values, valid = slots.take(jnp.ones((3, 6)), jnp.asarray(MARKS), 8)
    assert values.shape == valid.shape == (3, 8)
    np.testing.assert_array_equal(valid.sum(1), [2, 4, 0])
    np.testing.assert_array_equal(values, valid.astype(np.float32))


def test_gradients_reach_the_right_places():
    def total(x, values):
        taken, valid = slots.take(slots.put(x, MARKS, values), MARKS, 3)
        return (taken * jnp.arange(1, 4)[:, None]).sum(), valid

    grads = jax.grad(lambda *xs: total(*xs)[0], argnums=(0, 1))(jnp.ones((3, 6, 2)), VALUES)
    assert not np.any(grads[0])  # all that is taken was put
    np.testing.assert_array_equal(grads[1][0, :, 0], [1, 2, 0])
    np.testing.assert_array_equal(grads[1][1, :, 0], [1, 2, 3])
    assert not np.any(grads[1][2])
