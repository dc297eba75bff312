"""Annotations as pictures, on literal pixels."""

import json
import os

import numpy as np
import pytest

from tests import fuzz
from vlm_jax.data import annotations, drawing, records

BLACK = np.zeros((6, 8, 3), np.uint8)


def test_palette_is_fixed():
    assert drawing.PALETTE.shape == (256, 3) and drawing.PALETTE.dtype == np.uint8
    assert drawing.PALETTE[[0, 1, 2, 3, 4, 8, 15, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 0, 128],
        [64, 0, 0],
        [192, 128, 128],
        [224, 224, 192],
    ]
    assert len({tuple(entry) for entry in drawing.PALETTE.tolist()}) == 256
    # Class 256 does not fall on the background.
    assert drawing.colour(255) == (224, 224, 192) and drawing.colour(256) == (128, 0, 0)


def test_hues_of_openpose():
    assert drawing.HUES[:4] == ((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0))
    assert drawing.HUES[6] == (0, 255, 0) and drawing.HUES[12] == (0, 0, 255)
    assert len(set(drawing.HUES)) == 18


def test_boxes():
    drawn = drawing.boxes(BLACK, [annotations.Thing(label=1, box=(1, 1, 5, 4))])
    assert (drawn[..., 0] // 128).tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 0, 0],
        [0, 1, 0, 0, 0, 1, 0, 0],
        [0, 1, 0, 0, 0, 1, 0, 0],
        [0, 1, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert not drawn[..., 1:].any()
    # The small one stays visible whatever the order.
    things = [
        annotations.Thing(label=2, box=(1, 1, 2, 2)),
        annotations.Thing(label=1, box=(1, 1, 5, 4)),
    ]
    assert drawing.boxes(BLACK, things)[1, 1].tolist() == [0, 128, 0]
    # Lines of a photograph are as wide as a hundredth of its short side.
    wide = drawing.boxes(np.zeros((300, 400, 3), np.uint8), things[1:])
    assert wide[3, 3].any()


def test_masks_of_polygons_and_run_lengths():
    square = annotations.Thing(label=1, polygons=((1, 1, 4, 1, 4, 3, 1, 3),))
    assert drawing.mask(square, 6, 8).astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    point = annotations.Thing(
        label=2, rle={"size": [6, 8], "counts": [8, 1, 39]}
    )  # column 1, row 2
    drawn = drawing.masks(BLACK, [point, square])
    assert drawn[2, 1].tolist() == [0, 128, 0] and drawn[1, 1].tolist() == [128, 0, 0]


def test_run_lengths_go_down_the_columns():
    # 1 zero, 2 ones, 3 zeros in columns of two.
    expected = [[0, 1, 0], [1, 0, 0]]
    assert annotations.decode_rle([1, 2, 3], 2, 3).astype(int).tolist() == expected
    # The same as text: each count is one character, "0" plus the number.
    assert annotations.decode_rle("123", 2, 3).astype(int).tolist() == expected
    # 40 = 8 + 32 * 1: "0" + 8 + 32 = "X", then "1". The fourth count is 5 - 3 = 2 more than the
    # second; a fifth of 52, 2 less than the third: -2 is 30 in five bits: "0" + 30 = "N".
    runs = [40, 3, 54, 5, 52]
    np.testing.assert_array_equal(
        annotations.decode_rle("X13f12N", 11, 14), annotations.decode_rle(runs, 11, 14)
    )
    with pytest.raises(ValueError, match="RLE of 6 pixels, image of 8"):
        annotations.decode_rle([1, 2, 3], 2, 4)


def test_skeleton_on_literal_pixels():
    points = [(0, 0, 0)] * 18
    points[1], points[2] = (5, 10, 2), (20, 10, 1)  # neck and right shoulder
    points[3] = (20, 18, 0)  # not visible
    drawn = drawing.skeletons(np.zeros((20, 30, 3), np.uint8), [points])
    red, orange, amber = [255, 0, 0], [255, 85, 0], [255, 170, 0]
    row = [[0, 0, 0]] * 3 + [orange] * 5 + [red] * 10 + [amber] * 5 + [[0, 0, 0]] * 7
    assert drawn[10].tolist() == row  # point 1, limb 0, point 2
    assert not drawn[14:].any()
    with pytest.raises(ValueError, match="5 points; known are 17, 18"):
        drawing.skeletons(BLACK, [points[:5]])


def test_coco_points_become_openpose():
    coco = [(i, 10 * i, 2) for i in range(17)]
    made = drawing.to_openpose(coco)
    assert len(made) == 18 and made[0] == (0, 0, 2) and made[1] == (5.5, 55, 2)
    assert made[2] == (6, 60, 2) and made[5] == (5, 50, 2)  # right shoulder, left shoulder
    assert [made[i][0] for i in (14, 15, 16, 17)] == [2, 1, 4, 3]
    coco[5] = (5, 50, 0)
    assert drawing.to_openpose(coco)[1][2] == 0


def test_coco_file(tmp_path):
    path = tmp_path / "instances.json"
    shape = {"size": [6, 8], "counts": [0, 6, 42]}
    entries = [
        {"image_id": 7, "category_id": 90, "bbox": [1, 1, 4, 3], "segmentation": shape},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1], "keypoints": [1, 2, 2] * 17},
    ]
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "categories": [{"id": 90, "name": "cup"}, {"id": 3, "name": "car"}],
        "annotations": entries,
    }
    path.write_text(json.dumps(content))
    cup, car = annotations.load(str(path))["a.jpg"]
    assert (cup.label, cup.box, car.label) == (2, (1, 1, 5, 4), 1)  # ranks of the ids
    assert car.keypoints == ((1, 2, 2),) * 17 and cup.keypoints == ()
    filled = drawing.load(f"{path}:masks")
    assert filled.draw(BLACK, "a.jpg")[:, 0].tolist() == [[0, 128, 0]] * 6
    assert filled.has("a.jpg") and not filled.has("b.jpg")
    photo = np.full((6, 8, 3), 9, np.uint8)
    assert drawing.load(f"{path}:boxes").draw(photo, "a.jpg")[3, 3].tolist() == [9, 9, 9]
    assert drawing.load(f"{path}:boxes:black").draw(photo, "a.jpg")[3, 3].tolist() == [0, 0, 0]
    assert drawing.load(f"{path}:openpose:image").draw(photo, "a.jpg")[5, 7].tolist() == [9, 9, 9]
    with pytest.raises(records.BadRecordError, match="masks of a.jpg: RLE of size"):
        filled.draw(np.zeros((3, 3, 3), np.uint8), "a.jpg")


def test_own_form(tmp_path):
    path = tmp_path / "mine.json"
    objects = [{"label": 2, "box": [1, 1, 5, 4], "polygons": [[1, 1, 4, 1, 4, 3, 1, 3]]}]
    path.write_text(json.dumps([{"image": "sub/a.jpg", "objects": objects}]))
    (thing,) = annotations.load(str(path))["sub/a.jpg"]
    assert thing == annotations.Thing(2, (1, 1, 5, 4), (), ((1, 1, 4, 1, 4, 3, 1, 3),), {})


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"image": "a"}]', "no json", '{"images": 3}'])
def test_files_of_no_known_form(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(records.DataError, match=r"x\.json: neither COCO annotations nor a list"):
        drawing.load(f"{path}:boxes")


def test_names_of_drawings():
    assert drawing.split("a.json:masks") == ("a.json", "masks", "black")
    assert drawing.split("c:/a.json:boxes:black") == ("c:/a.json", "boxes", "black")
    for call in ("a.json", "a.json:depth", "boxes", "a.json:image"):
        with pytest.raises(records.DataError, match="KIND being one of boxes, masks, keypoints"):
            drawing.split(call)
    with pytest.raises(records.DataError, match="gone.json: cannot read"):
        drawing.load("gone.json:boxes")


GOOD = {"bbox": [1, 1, 4, 3], "segmentation": [[1, 1, 4, 1, 4, 3]], "keypoints": [1, 2, 2] * 17}
ODD = [
    {"bbox": [1e9, 0, 1, 1]}, {"bbox": [0, 0, 1e300, 1]}, {"bbox": [float("nan"), 0, 1, 1]},
    {"bbox": [1, 2, 3]}, {"bbox": ["1", 0, 1, 1]}, {"bbox": 5}, {"bbox": [None] * 4},
    {"bbox": [True, 0, 1, 1]}, {"bbox": [10**400, 0, 1, 1]}, {"bbox": {"x": 1}},
    {"keypoints": [1, 2]}, {"keypoints": [[1, 2, 2]] * 17}, {"keypoints": "abc"},
    {"keypoints": [1, 2, 2] * 5}, {"keypoints": [1e9, 2, 2] * 17},
    {"segmentation": [[1, 1, 4]]}, {"segmentation": [[1, 1]]}, {"segmentation": [1, 2, 3, 4]},
    {"segmentation": [[1e9, 1, 4, 1]]}, {"segmentation": 7}, {"segmentation": [[[1, 1]] * 4]},
    {"segmentation": {"size": [6, 8]}}, {"segmentation": {"counts": [48]}},
    {"segmentation": {"size": 6, "counts": [48]}}, {"segmentation": {"size": [6, 8], "counts": 5}},
    {"segmentation": {"size": [6, 8], "counts": [48.0]}},
    {"segmentation": {"size": [6, 8], "counts": [-1, 49]}},
    {"segmentation": {"size": [6, 8], "counts": "P" * 10**6}},
    {"segmentation": {"size": [6, 8], "counts": "P" * 100}},
    {"segmentation": {"size": [6, 8], "counts": [0] * 10**6}},
    {"segmentation": {"size": [6, 8], "counts": "\u00e9"}},
    {"segmentation": {"size": [10**9, 10**9], "counts": [10**18]}},
    {"category_id": [1]}, {"category_id": {}},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:60])
def test_an_odd_annotation_is_one_bad_record(tmp_path, odd):
    path = tmp_path / "x.json"
    annotations = [{"image_id": 1, **GOOD}, {"image_id": 2, **GOOD, **odd}]
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    refused = 0
    for kind in drawing.KINDS:
        drawn = drawing.load(f"{path}:{kind}")
        assert drawn.draw(BLACK, "a.jpg").any() and drawn.has("b.jpg")
        with fuzz.bounded(megabytes=16):
            try:
                drawn.draw(BLACK, "b.jpg")
            except records.BadRecordError as error:
                refused += 1
                assert len(str(error)) < 500
    assert refused


def test_annotations_in_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (str(tmp_path / "pipe.json"), "/dev/zero"):
        with pytest.raises(records.DataError, match="is not a regular file"):
            drawing.load(f"{path}:boxes")
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(records.DataError, match="RecursionError"):
        drawing.load(f"{path}:boxes")


@pytest.mark.parametrize("form", ["coco", "own"])
def test_damage_of_any_kind(tmp_path, form):
    rle = {"size": [6, 8], "counts": "123"}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": 3}],
        "annotations": [
            {"image_id": 1, "category_id": 3, **GOOD},
            {"image_id": 1, "segmentation": rle},
        ],
    }
    if form == "own":
        thing = {"label": 3, "box": [1, 2, 3, 4], "polygons": [[1, 1, 4, 1, 4, 3]], "rle": rle}
        points = {"keypoints": [[1, 2, 2]] * 18}
        content = [{"image": "a.jpg", "objects": [thing, points]}]
    for number, damaged in enumerate(fuzz.mutations(json.dumps(content).encode(), 300)):
        path = tmp_path / f"{number}.json"
        path.write_bytes(damaged)
        with fuzz.bounded(megabytes=16):
            for kind in drawing.KINDS:
                try:
                    drawn = drawing.load(f"{path}:{kind}")
                    if drawn.has("a.jpg"):
                        assert drawn.draw(BLACK, "a.jpg").shape == BLACK.shape
                except records.DataError:
                    pass


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_coco_ids_that_come_twice(tmp_path, kind):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [],
    }
    content[kind].append(content[kind][0])
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(records.DataError, match=f"the id 1 comes twice among {kind}"):
        annotations.load(str(tmp_path / "a.json"))


def test_coco_objects_that_cannot_be_are_bad_records(tmp_path):
    boxes = [[1, 2, 3, 4], [1, 2, -3, 4], [1, 2, 3, 4]]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [
            {"image_id": 1, "category_id": category, "bbox": box}
            for category, box in zip((7, 7, 8), boxes)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    good, backwards, unknown = annotations.load(str(tmp_path / "a.json"))["a.jpg"]
    assert good.label == 1 and not good.problem
    assert "ends before it begins" in backwards.problem
    assert "category 8 is not among" in unknown.problem
