"""Masks as run lengths, both ways, and out of polygons."""

import numpy as np
import pytest

from tests import fuzz
from vlm_jax import answer
from vlm_jax.data import annotations


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (40, 17)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_there_and_back(size, share):
    mask = np.random.default_rng(0).uniform(size=size) < share
    rle = annotations.encode_rle(mask)
    assert isinstance(rle, answer.Rle) and rle.size == size
    np.testing.assert_array_equal(annotations.decode(rle), mask)
    numbers = np.random.default_rng(1).integers(0, 2, size)
    np.testing.assert_array_equal(annotations.decode(annotations.encode_rle(numbers)), numbers)
    # The same through the line of JSON that answers are written as.
    said = answer.Answer(masks=(rle,))
    assert answer.Answer.from_json(said.to_json()).masks == (rle,)


def test_by_hand():
    # Columns: 00 10 ... of two rows: one zero, two ones, three zeros.
    rle = annotations.encode_rle(np.array([[0, 1, 0], [1, 0, 0]]))
    assert rle == answer.Rle((2, 3), "123")


def test_polygons_are_filled_as_coco_fills_them():
    # Corners are those of pixels: a square from 1 to 4 holds the pixels 1, 2, 3.
    square = annotations.fill([[1, 1, 4, 1, 4, 3, 1, 3]], 5, 6)
    assert square.astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    both = annotations.fill([[1, 1, 4, 1, 4, 3, 1, 3], [2, 2, 6, 2, 6, 5, 2, 5]], 5, 6)
    assert both.sum() == 6 + 12 - 2
    assert not annotations.fill([], 5, 6).any()
    outside = annotations.fill([[-50, -50, 50, -50, 50, 50, -50, 50]], 5, 6)
    assert outside.all()


@pytest.mark.parametrize(
    "polygons",
    [
        [[1, 1, 2, 2]],
        [[1, 1, 2, 2, 3]],
        [[1, 1, 2, 2, 3, 1e9]],
        [[1, 1, 2, 2, float("nan"), 4]],
        [["1"] * 6],
    ],
)
def test_polygons_that_are_none(polygons):
    with pytest.raises(ValueError, match="polygon"):
        annotations.fill(polygons, 5, 6)


def test_masks_that_are_none():
    with pytest.raises(ValueError, match="shape"):
        annotations.encode_rle(np.zeros((2, 3, 1), bool))
    with pytest.raises(ValueError, match="other values"):
        annotations.encode_rle(np.full((2, 3), 255, np.uint8))


TEXTS = ["", "1", "12", "124", "999", "PPPP", "o" * 30, "1" * 14, "0" * 40, "\x00", "~", "N", "1N3"]


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_texts_that_are_no_mask_of_this_size(text):
    """The library fills up what is missing, and follows odd characters anywhere."""
    with fuzz.bounded(megabytes=16), pytest.raises(ValueError, match="RLE"):
        annotations.decode_rle(text, 2, 3)


def test_random_texts_end_well():
    rng = np.random.default_rng(0)
    read = 0
    with fuzz.bounded(megabytes=64):
        for _ in range(3000):
            text = "".join(map(chr, rng.integers(40, 116, rng.integers(0, 12))))
            try:
                mask = annotations.decode_rle(text, 4, 5)
            except ValueError:
                continue
            read += 1
            assert annotations.encode_rle(mask).counts == text
    assert read < 3000
