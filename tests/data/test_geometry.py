"""Images, boxes, points and masks in a square and back: an original's numbers, and by hand."""

import pathlib

import numpy as np
import pytest

from vlm_jax.data import geometry
from vlm_jax.models import clip, sam

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "nextchat"


@pytest.fixture(scope="module")
def io():
    return np.load(FOLDER / "io.npz")


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_images_and_boxes_of_the_reference(io, name):
    """Wider than tall, taller than wide, a square."""
    image = io[f"image_{name}"]
    square = geometry.Square(image.shape[:2])
    np.testing.assert_array_equal(square.image_in(image, square.side), io[f"prep_{name}_square"])
    pixels = clip.normalize(square.image_in(image, 56))
    np.testing.assert_allclose(pixels, np.moveaxis(io[f"prep_{name}_clip"], 0, 2), atol=1e-5)
    boxes = square.boxes_in(io[f"prep_{name}_boxes_in"])
    np.testing.assert_allclose(boxes, io[f"prep_{name}_boxes_norm"], atol=1e-6)
    np.testing.assert_allclose(square.boxes_out(boxes), io[f"prep_{name}_boxes_in"], atol=1e-4)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_canvas_of_the_reference(io, name):
    image = io[f"image_{name}"]
    square = geometry.Square(image.shape[:2])
    canvas, place = square.canvas(image, 128)
    x0, y0, x1, y1 = place
    np.testing.assert_array_equal([y1 - y0, x1 - x0], io[f"prep_{name}_sam_hw"])
    pixels = sam.normalize(canvas[None], place[None])[0]
    np.testing.assert_allclose(pixels, np.moveaxis(io[f"prep_{name}_sam"], 0, 2), atol=1e-5)
    mask = square.mask_in(io[f"prep_{name}_mask_in"], 128)
    np.testing.assert_array_equal(mask, io[f"prep_{name}_mask_sam"])


@pytest.mark.parametrize("name, image", [("gen", "a"), ("region", "c"), ("beam", "a")])
def test_answers_of_the_reference_in_pixels(io, name, image):
    square = geometry.Square(io[f"image_{image}"].shape[:2])
    boxes = square.boxes_out(io[f"{name}_locs"])
    np.testing.assert_allclose(boxes, io[f"{name}_boxes_pixels"], atol=1e-3)
    for logits, mask in zip(io[f"{name}_masks"][:, 0], io[f"{name}_masks_pixels"]):
        np.testing.assert_array_equal(square.mask_out(logits), mask)


def test_a_scored_mask_of_the_reference(io):
    square = geometry.Square(tuple(io["metric_res_img_hw"].tolist()))
    found = square.mask_out(io["metric_res_pred_logits"][0, 0])
    np.testing.assert_array_equal(found, io["metric_res_pred_mask"][0])
    # Its truth is a sum of polygons, 2 where they overlap.
    assert (found * io["metric_res_gt"][0]).sum() == io["metric_res_intersection"][0]


@pytest.mark.parametrize("size", [(44, 60), (60, 44), (50, 50), (1, 7)])
def test_there_and_back(size):
    height, width = size
    rng, square = np.random.default_rng(0), geometry.Square(size)
    points = rng.uniform(0, (width, height), (5, 2)).astype(np.float32)
    inside = square.points_in(points)
    assert np.all((inside >= 0) & (inside <= 1))
    np.testing.assert_allclose(square.points_out(inside), points, atol=1e-4)
    low, high = np.minimum(points, points[::-1]), np.maximum(points, points[::-1]) + 1e-3
    boxes = np.concatenate([low, high], axis=1)
    corners = np.concatenate([square.points_in(low), square.points_in(high)], axis=1)
    np.testing.assert_allclose(square.boxes_in(boxes), corners, atol=1e-6)


def test_masks_there_and_back():
    mask = np.zeros((44, 60), bool)
    mask[10:30, 20:50] = True
    square = geometry.Square(mask.shape)
    inside = square.mask_in(mask, 240)
    assert inside.dtype == np.uint8 and inside.sum() == 16 * mask.sum()
    np.testing.assert_array_equal(square.mask_out(inside - 0.5), mask)
    assert not square.mask_in(np.zeros_like(mask), 240).any()
    overlapping = square.mask_in(2 * mask.astype(np.uint8), 240)  # sums of polygons: in or out
    np.testing.assert_array_equal(overlapping, inside)


def test_boxes_are_cut_at_the_edges_of_the_square():
    square = geometry.Square((44, 60))
    found = square.boxes_in([[-3, 5, 70, 20], [0, 0, 60, 44]])
    np.testing.assert_allclose(found, [[0, 13 / 60, 1, 28 / 60], [0, 8 / 60, 1, 52 / 60]])
    assert square.boxes_in([]).shape == (0, 4)


@pytest.mark.parametrize("boxes, message", [
    ([[1, 2, 3, 4], [5, 0, 2, 4]], "box 1, .* ends before it begins"),
    ([[0, 0, float("nan"), 4]], "box 0, .* not finite"),
    ([[70, 0, 80, 4]], "box 0, .* outside of the image of 60 x 44"),
    ([[1, 2, 3]], r"boxes of shape \[1, 3\]"),
    ([["a", 2, 3, 4]], "no numbers"),
    ([[1, 2, 3, 4], [1, 2]], "no numbers"),
])  # fmt: skip
def test_boxes_that_are_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        geometry.checked_boxes(boxes, (44, 60))
