import numpy as np
import pytest

from vlm_jax.data import records
from vlm_jax.systems.lvm import layouts


def pictures(count, side=16):
    return [np.full((side, side, 3), 10 * i + 5, np.uint8) for i in range(count)]


def values(images):
    return [int(image[0, 0, 0]) // 10 for image in images]


def test_video_clips():
    rng = np.random.default_rng(0)
    frames = np.stack(pictures(20))
    starts = set()
    for _ in range(60):
        found = values(layouts.video_clip(frames, rng, num_images=4, stride=5))
        assert np.diff(found).tolist() == [5, 5, 5]
        starts.add(found[0])
    assert starts == {0, 1, 2, 3, 4}  # every legal start
    # Too short for the stride: (20 - 1) // 15 = 1.
    found = values(layouts.video_clip(frames, rng, num_images=16, stride=8))
    assert np.diff(found).tolist() == [1] * 15
    with pytest.raises(records.BadRecordError, match="20 frames cannot give 21 images"):
        layouts.video_clip(frames, rng, num_images=21)


def test_category_groups():
    by_class = {"a": pictures(4), "b": pictures(9)[4:], "c": pictures(12)[9:]}
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = values(layouts.category_groups(by_class, rng, num_images=8, per_class=4))
        assert len(set(found)) == 8  # no image twice
        assert {set("abc"[np.searchsorted([4, 9], i, "right")] for i in group).pop()
                for group in (found[:4], found[4:])} == {"a", "b"}  # fmt: skip
    with pytest.raises(records.DataError, match="2 classes have 4 images, needs 4"):
        layouts.category_groups(by_class, rng)


def test_pairs_and_colorization():
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    grey, colour = layouts.colorization([red])
    assert (grey == 60).all() and (colour == red).all()  # round(0.2989 * 200)
    assert values(layouts.pairs(pictures(2), pictures(4)[2:])) == [0, 2, 1, 3]
    with pytest.raises(ValueError, match="1 sources for 2 targets"):
        layouts.pairs(pictures(1), pictures(2))


def test_inpainting_hides_squares_and_patches():
    rng = np.random.default_rng(0)
    white = np.full((64, 64, 3), 255, np.uint8)
    squares = 0
    for _ in range(300):
        masked, image = layouts.inpainting([white], rng)
        assert (image == 255).all()
        hidden = (masked == 0).all(-1)
        assert (hidden == (masked == 0).any(-1)).all()
        patches = hidden.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
        if not (patches.all(1) | ~patches.any(1)).all():
            rows, columns = np.nonzero(hidden.any(1))[0], np.nonzero(hidden.any(0))[0]
            side = len(rows)
            assert side == len(columns) and hidden.sum() == side**2 and 6 <= side < 32
            squares += 1
    assert 60 <= squares <= 120  # 3 in 10, but for squares that happen to be whole patches


def test_pan_moves_in_a_straight_line_inside_the_photo():
    rows, columns = np.mgrid[0:60, 0:90]
    photo = np.stack([rows, columns, rows * 0], axis=-1).astype(np.uint8)
    for seed in range(20):
        frames = layouts.pan(photo, np.random.default_rng(seed), num_images=5)
        side = len(frames[0])
        assert {frame.shape for frame in frames} == {(side, side, 3)} and 24 <= side <= 42
        # A pixel holds its own place, so that the first one of a frame is the window's corner.
        corners = np.array([frame[0, 0, :2] for frame in frames], int)
        moves = np.diff(corners, axis=0)
        assert (np.ptp(moves, axis=0) <= 1).all() and np.abs(moves).max() <= 0.1 * side + 1
