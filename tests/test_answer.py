"""Answers: one class for what is said and what is true."""

import json

import numpy as np
import pytest

from vlm_jax import answer

FULL = dict(
    text="a dog on a mat",
    labels=(("dog", 0.5), ("mat", 0.25)),
    boxes_xyxy_px=[[1, 2, 3.5, 4], [0, 0, 9, 9]],
    points_xy_px=[[5, 6]],
    masks=(answer.Rle((4, 6), "0T1"),),
    images=(np.zeros((2, 3, 3), np.float32),),
    scores=[0.75, 0.5],
    spans=(answer.Span(2, 5, "box", 0), answer.Span(11, 14, "mask", 0)),
    problem="the text ends in the middle",
)


def test_there_and_back_as_json():
    made = answer.Answer(**FULL)
    text = json.dumps(made.to_json(), allow_nan=False)
    again = answer.Answer.from_json({**json.loads(text), "id": "somebody else's"})
    # Images are files of their own.
    assert again == answer.Answer(**{**FULL, "images": ()})
    assert again != made
    assert made.to_json()["boxes_xyxy_px"] == [[1.0, 2.0, 3.5, 4.0], [0.0, 0.0, 9.0, 9.0]]
    assert made.boxes_xyxy_px.dtype == made.scores.dtype == np.float32


def test_what_is_not_said_is_not_written():
    assert answer.Answer().to_json() == {}
    assert answer.Answer.from_json({}) == answer.Answer()
    assert answer.Answer(text="x").to_json() == {"text": "x"}


def test_numbers_that_json_lacks():
    made = answer.Answer(boxes_xyxy_px=[[0, 1, np.nan, np.inf]], labels=[("a", np.nan)])
    line = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert line["boxes_xyxy_px"] == [[0.0, 1.0, None, None]]
    again = answer.Answer.from_json(line)
    np.testing.assert_array_equal(again.boxes_xyxy_px, [[0, 1, np.nan, np.nan]])


def test_equality_looks_at_every_number():
    one = answer.Answer(**FULL)
    assert one == answer.Answer(**FULL)
    for key, other in {
        "text": "a cat on a mat",
        "labels": (("dog", 0.5),),
        "boxes_xyxy_px": [[1, 2, 3.5, 4], [0, 0, 9, 8]],
        "images": (np.ones((2, 3, 3), np.float32),),
        "problem": "",
    }.items():
        assert one != answer.Answer(**{**FULL, key: other}), key


@pytest.mark.parametrize("fields, message", [
    (dict(boxes_xyxy_px=[1, 2, 3, 4]), r"boxes_xyxy_px is of shape \[4\], not \[K, 4\]"),
    (dict(points_xy_px=[[1, 2, 3]]), r"points_xy_px is of shape \[1, 3\]"),
    (dict(text="ab", spans=[answer.Span(0, 3, "box", 0)], boxes_xyxy_px=[[0, 0, 1, 1]]),
     "2 characters"),
    (dict(text="ab", spans=[answer.Span(0, 1, "box", 1)], boxes_xyxy_px=[[0, 0, 1, 1]]),
     "'box': 1"),
    (dict(text="ab", spans=[answer.Span(0, 1, "thing", 0)]), "thing"),
    (dict(boxes_xyxy_px=[[0, 0, 1, 1]] * 3, scores=[1, 2]), "2 scores"),
])  # fmt: skip
def test_answers_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        answer.Answer(**fields)


@pytest.mark.parametrize("line", [
    dict(text=3), dict(labels=[["a"]]), dict(boxes_xyxy_px=[["x", 1, 2, 3]]),
    dict(boxes_xyxy_px=[[1, 2], [3]]), dict(masks=[{"size": [1]}]), dict(spans=[[0, 1]]),
])  # fmt: skip
def test_lines_that_are_no_answers(line):
    (key,) = line
    with pytest.raises(ValueError, match=key):
        answer.Answer.from_json(line)
