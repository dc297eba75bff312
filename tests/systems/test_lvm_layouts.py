import numpy as np
import pytest

from vlm_jax.data import pictures, records
from vlm_jax.systems.lvm import layouts


def numbered(count, side=16):
    return [np.full((side, side, 3), 10 * i + 5, np.uint8) for i in range(count)]


def values(images):
    return [int(image[0, 0, 0]) // 10 for image in images]


def test_video_clips():
    rng = np.random.default_rng(0)
    frames = np.stack(numbered(20))
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
    by_class = {"a": numbered(4), "b": numbered(9)[4:], "c": numbered(12)[9:]}
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = values(layouts.category_groups(by_class, rng, num_images=8, per_class=4))
        assert len(set(found)) == 8  # no image twice
        assert {
            set("abc"[np.searchsorted([4, 9], i, "right")] for i in group).pop()
            for group in (found[:4], found[4:])
        } == {"a", "b"}
    with pytest.raises(records.DataError, match="2 classes have 4 images, needs 4"):
        layouts.category_groups(by_class, rng)


def test_pairs_and_colorization():
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    grey, colour = layouts.colorization([red])
    assert (grey == 60).all() and (colour == red).all()  # round(0.2989 * 200)
    assert values(layouts.pairs(numbered(2), numbered(4)[2:])) == [0, 2, 1, 3]
    with pytest.raises(ValueError, match="1 sources for 2 targets"):
        layouts.pairs(numbered(1), numbered(2))


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


def test_groups_are_fresh_permutations_every_epoch():
    # Two pairs of five an epoch; one is left over.
    found = [layouts.group(number, 5, 2, seed=0) for number in range(6)]
    assert found == [[2, 3], [1, 0], [0, 3], [1, 2], [0, 2], [4, 3]]
    assert layouts.group(3, 5, 2, seed=0) == [1, 2]  # whatever was asked before
    assert layouts.group(0, 5, 2, seed=1) == [2, 1]
    whole = [layouts.group(number, 32, 8, seed=4) for number in range(4)]
    assert sorted(sum(whole, [])) == list(range(32))
    with pytest.raises(records.DataError, match="7 images cannot fill a group of 8"):
        layouts.group(0, 7, 8, seed=0)


def test_frame_folders_have_strides_one_to_four():
    strides = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        found = layouts.any_stride_clip(range(100), rng, num_images=16, max_stride=4)
        strides.add(tuple(np.diff(found)))
    assert strides == {(stride,) * 15 for stride in (1, 2, 3, 4)}


def test_rotation_goes_around():
    starts = set()
    for seed in range(60):
        found = layouts.rotation(range(6), np.random.default_rng(seed), num_images=4)
        assert all((b - a) % 6 == 1 for a, b in zip(found, found[1:]))
        starts.add(found[0])
    assert starts == {0, 1, 2, 3, 4, 5}
    rng = np.random.default_rng(0)
    found = layouts.rotation(range(5), rng, num_images=5, step=2)
    assert sorted(found) == [0, 1, 2, 3, 4] and (found[1] - found[0]) % 5 == 2
    with pytest.raises(records.BadRecordError, match="24 views cannot give 16 at step 3"):
        layouts.rotation(range(24), rng, num_images=16, step=3)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_categories_come_in_blocks(size):
    by_class = {name: [f"{name}{i}" for i in range(16)] for name in "abcdefgh"}
    found = layouts.category_groups(by_class, np.random.default_rng(1), per_class=size)
    classes = [image[0] for image in found]
    blocks = [set(classes[at : at + size]) for at in range(0, 16, size)]
    assert all(len(block) == 1 for block in blocks)
    assert len(set.union(*blocks)) == 16 // size and len(set(found)) == 16


def test_several_annotations_share_one_order():
    shots = [["x1", "d1", "e1"], ["x2", "d2", "e2"]]
    orders = set()
    for seed in range(60):
        found = layouts.modalities(shots, np.random.default_rng(seed))
        first, second = found[:3], found[3:]
        assert [name[0] for name in first] == [name[0] for name in second]
        assert {name[1] for name in first} == {"1"} and {name[1] for name in second} == {"2"}
        orders.add("".join(name[0] for name in first))
    assert orders == {"xde", "xed", "dxe", "dex", "exd", "edx"}  # the image anywhere
    drawn = {
        tuple(layouts.modalities(shots, np.random.default_rng(s), elements=2)) for s in range(60)
    }
    assert len(drawn) == 6 and ("e1", "x1", "e2", "x2") in drawn
    with pytest.raises(records.DataError, match="4 elements of an image with 2 annotations"):
        layouts.modalities(shots, np.random.default_rng(0), elements=4)


def test_annotated_clips_in_both_orders():
    clips = [[[1, 2, 3], [-1, -2, -3]], [[7, 8, 9], [-7, -8, -9]]]
    assert layouts.annotated_clips(clips, interleaved=False) == [
        1,
        2,
        3,
        -1,
        -2,
        -3,
        7,
        8,
        9,
        -7,
        -8,
        -9,
    ]
    assert layouts.annotated_clips(clips, interleaved=True) == [
        1,
        -1,
        2,
        -2,
        3,
        -3,
        7,
        -7,
        8,
        -8,
        9,
        -9,
    ]


def test_objects_show_frames_then_their_masks():
    frames = list(range(10))
    tracks = [
        [frames, [-i for i in frames]],
        [[i + 100 for i in frames], [-i - 100 for i in frames]],
    ]
    found = layouts.objects(tracks, np.random.default_rng(0), per_object=4)
    assert len(found) == 16
    for rgb, masks in ((found[:4], found[4:8]), (found[8:12], found[12:])):
        assert masks == [-i for i in rgb] and rgb == sorted(set(rgb))
    assert max(found[:4]) < 100 <= min(found[8:12])
    with pytest.raises(records.BadRecordError, match="3 frames cannot give 4 images"):
        layouts.objects([[frames[:3], frames[:3]]], np.random.default_rng(0))


def test_altered_pictures_are_not_read():
    one, two = pictures.Picture("1.jpg"), pictures.Picture("2.jpg")
    grey = (("grey",),)
    assert layouts.colorization([one, two]) == [
        pictures.Picture("1.jpg", edits=grey),
        one,
        pictures.Picture("2.jpg", edits=grey),
        two,
    ]
    found = layouts.inpainting([one, two], np.random.default_rng(0))
    assert found[1::2] == [one, two]
    assert [picture.path for picture in found[::2]] == ["1.jpg", "2.jpg"]
    (name, seed), (_, other) = found[0].edits[0], found[2].edits[0]
    assert name == "hide" and seed != other
