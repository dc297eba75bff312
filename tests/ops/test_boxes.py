"""Boxes: numbers by hand, boxes without area, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops import boxes


@pytest.mark.parametrize("a, b, iou, giou", [
    ([0, 0, 2, 2], [0, 0, 2, 2], 1, 1),
    ([0, 0, 2, 2], [1, 0, 3, 2], 1 / 3, 1 / 3),  # the hull is the union
    ([0, 0, 1, 1], [2, 0, 3, 1], 0, -1 / 3),  # a third of the hull is between them
    ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),
    ([0, 0, 1, 1], [0, 0, 0, 0], 0, 0),
    ([5, 5, 5, 5], [5, 5, 5, 5], 0, 0),
])  # fmt: skip
def test_by_hand(a, b, iou, giou):
    a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
    for x, y in ((a, b), (b, a)):
        assert float(boxes.iou(x, y)) == pytest.approx(iou)
        assert float(boxes.giou(x, y)) == pytest.approx(giou)
        for f in (boxes.iou, boxes.giou):
            assert np.all(np.isfinite(jax.grad(f)(x, y)))


def test_all_to_all():
    a = jnp.array([[0, 0, 2, 2], [1, 0, 3, 2]], jnp.float32)
    found = boxes.iou(a[:, None], a[None])
    np.testing.assert_allclose(found, [[1, 1 / 3], [1 / 3, 1]], rtol=1e-6)


def test_areas_and_order():
    some = jnp.array([[0, 0, 2, 3], [2, 0, 0, 3], [1, 1, 1, 1], [0, 0, np.nan, 1]])
    np.testing.assert_array_equal(boxes.area(some)[:3], [6, 0, 0])
    np.testing.assert_array_equal(boxes.is_ordered(some), [True, False, True, False])
