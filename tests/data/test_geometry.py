"""Pictures, boxes, points and masks on a canvas and back: an original's numbers, and by hand."""

import pathlib

import numpy as np
import pytest

from vlm_jax.data import geometry, images, records
from vlm_jax.models import clip, sam

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "nextchat"


@pytest.fixture(scope="module")
def io():
    return np.load(FOLDER / "io.npz")


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_pictures_and_boxes_of_the_reference(io, name):
    """Wider than tall, taller than wide, a square."""
    picture = io[f"image_{name}"]
    square = geometry.Square(*picture.shape[:2])
    np.testing.assert_array_equal(images.pad_square(picture, 255), io[f"prep_{name}_square"])
    pixels = clip.normalize(square.image(picture, 56))
    np.testing.assert_allclose(pixels, np.moveaxis(io[f"prep_{name}_clip"], 0, 2), atol=1e-5)
    boxes = square.boxes(io[f"prep_{name}_boxes_in"])
    np.testing.assert_allclose(boxes, io[f"prep_{name}_boxes_norm"], atol=1e-6)
    np.testing.assert_allclose(square.boxes_px(boxes), io[f"prep_{name}_boxes_in"], atol=1e-4)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_canvas_of_the_reference(io, name):
    picture = io[f"image_{name}"]
    canvas = geometry.Canvas(*picture.shape[:2], 128)
    np.testing.assert_array_equal(canvas.size, io[f"prep_{name}_sam_hw"])
    pixels = sam.normalize(canvas.image(picture)[None], canvas.place[None])[0]
    np.testing.assert_allclose(pixels, np.moveaxis(io[f"prep_{name}_sam"], 0, 2), atol=1e-5)
    mask = canvas.mask(io[f"prep_{name}_mask_in"])
    np.testing.assert_array_equal(mask, io[f"prep_{name}_mask_sam"])


@pytest.mark.parametrize("name, image", [("gen", "a"), ("region", "c"), ("beam", "a")])
def test_answers_of_the_reference_in_pixels(io, name, image):
    square = geometry.Square(*io[f"image_{image}"].shape[:2])
    boxes = square.boxes_px(io[f"{name}_locs"])
    np.testing.assert_allclose(boxes, io[f"{name}_boxes_pixels"], atol=1e-3)
    for logits, mask in zip(io[f"{name}_masks"][:, 0], io[f"{name}_masks_pixels"]):
        np.testing.assert_array_equal(square.mask(logits), mask)


def test_a_scored_mask_of_the_reference(io):
    square = geometry.Square(*io["metric_res_img_hw"])
    found = square.mask(io["metric_res_pred_logits"][0, 0])
    np.testing.assert_array_equal(found, io["metric_res_pred_mask"][0])
    # Its truth is a sum of polygons, 2 where they overlap.
    assert (found * io["metric_res_gt"][0]).sum() == io["metric_res_intersection"][0]


@pytest.mark.parametrize("size", [(44, 60), (60, 44), (50, 50), (1, 7)])
@pytest.mark.parametrize("corner", [False, True])
def test_there_and_back(size, corner):
    height, width = size
    rng = np.random.default_rng(0)
    points = rng.uniform(0, (width, height), (5, 2)).astype(np.float32)
    square, canvas = geometry.Square(*size), geometry.Canvas(*size, 96, corner=corner)
    np.testing.assert_allclose(square.points_px(square.points(points)), points, atol=1e-4)
    np.testing.assert_allclose(canvas.points_px(canvas.points(points)), points, atol=1e-4)
    edges = np.array([[0, 0, width, height]])
    np.testing.assert_allclose(canvas.boxes(edges)[0], canvas.place, atol=1e-3)
    x0, y0, x1, y1 = canvas.place
    assert (x0, y0) == (0, 0) if corner else abs((96 - x1) - x0) <= 1 and abs((96 - y1) - y0) <= 1


def test_masks_there_and_back():
    mask = np.zeros((44, 60), bool)
    mask[10:30, 20:50] = True
    canvas = geometry.Canvas(44, 60, 240)
    assert canvas.mask(mask).sum() == 16 * mask.sum()
    np.testing.assert_array_equal(canvas.mask_px(canvas.mask(mask) - 0.5), mask)
    empty = canvas.mask(np.zeros_like(mask))
    assert empty.dtype == np.uint8 and not empty.any()
    overlapping = canvas.mask(2 * mask.astype(np.uint8))  # sums of polygons are in or out
    assert overlapping.max() == 1


def test_bilinear_by_hand():
    np.testing.assert_allclose(geometry.resize_bilinear([[0, 4]], 1, 4), [[0, 1, 3, 4]])
    np.testing.assert_allclose(geometry.resize_bilinear([[0, 1, 2, 3]], 1, 2), [[0.5, 2.5]])
    same = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    np.testing.assert_array_equal(geometry.resize_bilinear(same, 5, 7), same)


def test_bilinear_is_torchs():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(13, 8)).astype(np.float32)
    for size in ((29, 31), (5, 3)):
        made = torch.nn.functional.interpolate(
            torch.tensor(x)[None, None], size, mode="bilinear", align_corners=False
        )
        np.testing.assert_allclose(geometry.resize_bilinear(x, *size), made[0, 0], atol=1e-5)


def test_boxes_are_cut_at_the_edges():
    found = geometry.check_boxes([[-3, 5, 70, 20], [1, 2, 3, 4]], 44, 60)
    np.testing.assert_array_equal(found, [[0, 5, 60, 20], [1, 2, 3, 4]])
    assert geometry.check_boxes([], 44, 60).shape == (0, 4)


@pytest.mark.parametrize("boxes, message", [
    ([[1, 2, 3, 4], [5, 0, 2, 4]], "box 1, .* wrong way round"),
    ([[0, 0, float("nan"), 4]], "box 0, .* is not finite"),
    ([[70, 0, 80, 4]], "box 0, .* has no pixel in its picture of 60x44"),
    ([[1, 1, 1, 9]], "has no pixel"),
    ([[1, 2, 3]], "boxes have 3 numbers"),
    ([["a", 2, 3, 4]], "not four numbers each"),
    ([[1, 2, 3, 4], [1, 2]], "not four numbers each"),
])  # fmt: skip
def test_boxes_that_are_refused(boxes, message):
    with pytest.raises(records.BadRecordError, match=message):
        geometry.check_boxes(boxes, 44, 60)
