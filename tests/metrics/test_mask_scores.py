import numpy as np
import pytest

from vlm_jax.metrics import masks


def mask(*rows):
    return np.array([[[x == "#" for x in row] for row in rows]])


def test_iou_by_hand():
    one, other = mask("##..", "##.."), mask(".##.", ".##.")
    np.testing.assert_allclose(masks.iou(one, other), [2 / 6])
    np.testing.assert_allclose(masks.iou(one, one), [1])
    np.testing.assert_allclose(masks.iou(one, mask("....", "...#")), [0])
    nothing = mask("....", "....")
    np.testing.assert_allclose(masks.iou(nothing, nothing), [1])
    with pytest.raises(ValueError, match="cannot be compared"):
        masks.iou(one, one[:, :1])


def test_boxes_by_hand():
    found = masks.boxes_of(np.concatenate([mask(".#..", "..#."), mask("....", "....")]))
    np.testing.assert_array_equal(found, [[1, 0, 3, 2], [0, 0, 0, 0]])
    # 2x2 and 2x2 sharing 1x2: 2 / (4 + 4 - 2)
    boxes, other = np.array([[0, 0, 2, 2]]), np.array([[1, 0, 3, 2]])
    np.testing.assert_allclose(masks.box_iou(boxes, other), [2 / 6])
    np.testing.assert_allclose(masks.box_iou(boxes, np.array([[5, 5, 6, 6]])), [0])
    nothing = np.zeros((1, 4), int)
    np.testing.assert_allclose(masks.box_iou(nothing, nothing), [0])
