"""Annotated photos, and scenes made of them."""

import numpy as np
import pytest

from vlm_jax.data import records
from vlm_jax.datasets import demo_annotations, demo_scenes


def test_annotations_fit_their_photos(demo_data):
    photos = demo_annotations.load("all")
    assert len(photos) == 28
    assert len(demo_annotations.load("heldout")) == 6
    for photo in photos:
        height, width = photo["image_u8"].shape[:2]
        assert (height, width) == (photo["height"], photo["width"])
        for thing in photo["objects"]:
            x0, y0, x1, y1 = thing["box_xyxy_px"]
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            if thing.get("mask_quality") == "good":
                ys, xs = np.nonzero(demo_annotations.mask(photo, thing))
                overlap = max(0, min(x1, xs.max() + 1) - max(x0, xs.min()))
                overlap *= max(0, min(y1, ys.max() + 1) - max(y0, ys.min()))
                own = (xs.max() + 1 - xs.min()) * (ys.max() + 1 - ys.min())
                assert overlap / ((x1 - x0) * (y1 - y0) + own - overlap) > 0.9


def test_cutouts_are_split_by_instance(demo_data):
    train = [label for label, _ in demo_scenes.cutouts("train")]
    heldout = [label for label, _ in demo_scenes.cutouts("heldout")]
    assert train.count("coin") == 16 and heldout.count("coin") == 8
    assert heldout.count("strawberry") == 9 and "strawberry" not in train
    assert "rocket" in train and "rocket" not in heldout


def test_scenes(demo_data):
    scenes = demo_scenes.Scenes("train", count=5, size=48, things=3)
    for index in range(len(scenes)):
        scene = scenes[index]
        again = scenes[index]
        assert scene["image_u8"].shape == (48, 48, 3) and scene["image_u8"].dtype == np.uint8
        np.testing.assert_array_equal(scene["image_u8"], again["image_u8"])
        assert len(scene["labels"]) == len(scene["masks"]) >= 1
        assert scene["masks"].any((1, 2)).all()
        assert scene["masks"].sum(0).max() == 1  # a pixel has one owner
    first = demo_scenes.Scenes("heldout", count=5, size=48)[0]
    assert not np.array_equal(first["image_u8"], scenes[0]["image_u8"])
    assert len(first["labels"]) == 1
    assert first["labels"][0] in ("coin", "strawberry", "car")
    with pytest.raises(records.DataError, match="'train' or 'heldout'"):
        demo_scenes.Scenes("test")
