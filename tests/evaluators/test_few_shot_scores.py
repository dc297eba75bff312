import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.evaluators import fakes
from tests.evaluators.fakes import gray
from vlm_jax import answer
from vlm_jax.data import images
from vlm_jax.evaluators import few_shot

W = 255
PHOTO = gray([0, 0, 0], [0, 0, W])
MASK1, MASK2 = gray([W, W, 0], [0, 0, 0]), gray([W, 0, 0], [W, 0, 0])
TRUE = gray([W, W, 0], [W, W, 0])
MADE = gray([W, 0, 0], [W, 0, W])


def predict(ids):
    return lambda batch: {"ids": np.array(ids)[:, None]}


def reader(*pictures_u8):
    return fakes.Reader([images.to01(picture) for picture in pictures_u8])


def test_segmentation_by_hand(tmp_path):
    batch = fakes.prompt_batch(
        [[PHOTO, MASK1, PHOTO, MASK2, PHOTO]] * 2,
        [TRUE, TRUE],
        labels=[3, 8],
        folds=[0, 1],
        names=["a/bird", "b/cat"],
    )
    # Ids 0 and 1 are what the tokenizer makes of the true answers, 2 and 3 are generated.
    scores = fakes.run(
        few_shot.Evaluator(kind="segmentation"),
        [batch],
        reader=reader(TRUE, TRUE, MADE, TRUE),
        predict=predict([2, 3]),
        out_dir=tmp_path,
    )
    lines = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert lines[0]["id"] == "a/bird" and lines[0]["iou"] == pytest.approx(2 / 5)
    assert lines[1]["iou"] == 1
    assert scores["iou"] == scores["miou"] == pytest.approx(0.7)
    assert (scores["fold_0_iou"], scores["fold_1_iou"]) == (pytest.approx(0.4), 1)
    assert scores["tokenizer_iou"] == 1
    assert scores["copy_input_iou"] == 0  # the one bright pixel is not in the answer
    assert scores["all_foreground_iou"] == pytest.approx(4 / 6)
    # Mean of the examples: 1, 0.5, 0 / 0.5, 0, 0; only one pixel is above a half.
    assert scores["mean_mask_iou"] == pytest.approx(1 / 4)
    assert (scores["images"], scores["classes"]) == (2, 2)
    assert Image.open(tmp_path / "few_shot.png").width > 7 * 96


def test_means_over_classes_and_over_images_differ():
    batch = fakes.prompt_batch([[PHOTO, MASK1, PHOTO]] * 3, [TRUE] * 3, labels=[1, 1, 2])
    scores = fakes.run(
        few_shot.Evaluator(kind="segmentation"),
        [batch],
        reader=reader(TRUE, TRUE, TRUE, PHOTO),
        predict=predict([0, 3, 0]),
    )
    assert scores["iou"] == pytest.approx(2 / 3)
    assert scores["miou"] == pytest.approx((0.5 + 1) / 2)


def test_detection_scores_boxes():
    # Two far corners: 2 of 6 pixels right of 2 + 4 - 1 in the union; their box is everything.
    batch = fakes.prompt_batch([[PHOTO, MASK1, PHOTO]], [TRUE])
    scores = fakes.run(
        few_shot.Evaluator(kind="detection"),
        [batch],
        reader=reader(TRUE, gray([W, 0, 0], [0, 0, W])),
        predict=predict([1]),
    )
    assert scores["iou"] == pytest.approx(1 / 5)
    assert scores["box_iou"] == pytest.approx(4 / 6)
    assert scores["all_foreground_box_iou"] == pytest.approx(4 / 6)
    assert scores["copy_input_box_iou"] == 0


def test_colorization_by_hand():
    grey, true = gray([51, 51]), gray([102, 102])
    batch = fakes.prompt_batch([[grey, true, grey]], [true])
    scores = fakes.run(
        few_shot.Evaluator(kind="colorization"),
        [batch],
        reader=reader(true, gray([0, 102])),
        predict=predict([1]),
    )
    assert scores["mse"] == pytest.approx(0.4**2 / 2)
    assert scores["mse_x3"] == pytest.approx(3 * 0.4**2 / 2)
    assert scores["copy_input_mse"] == pytest.approx(0.2**2)
    assert scores["tokenizer_mse"] == 0
    assert "iou" not in scores and "lpips" not in scores


def test_lpips_of_equal_images_and_of_others(monkeypatch):
    def distance(image01, other01):
        return np.abs(image01 - other01).mean(axis=(1, 2, 3)).astype(np.float64)

    monkeypatch.setattr(few_shot, "_lpips", lambda: distance)
    grey, true = gray([0, 0]), gray([W, W])
    scores = fakes.run(
        few_shot.Evaluator(kind="colorization", lpips=True),
        [fakes.prompt_batch([[grey, true, grey]], [true])],
        reader=reader(true),
        predict=predict([0]),
    )
    assert (scores["lpips"], scores["copy_input_lpips"]) == (0, 1)


def test_the_colour_rule():
    red = few_shot.Evaluator(
        kind="segmentation", foreground=(1, 0, 0), background=(0, 0, 1), threshold=0.75
    )
    colours = np.array([[[1, 0, 0], [0, 0, 1], [0.8, 0, 0.2], [0.7, 0, 0.3], [0, 1, 0]]])
    np.testing.assert_array_equal(
        red._is_foreground(colours[None])[0, 0], [True, False, True, False, False]
    )


def test_rows_that_fill_the_batch_do_not_count():
    batch = fakes.prompt_batch([[PHOTO, MASK1, PHOTO]] * 2, [TRUE] * 2, valid=[False, True])
    evaluator = few_shot.Evaluator(kind="segmentation")
    scores = fakes.run(evaluator, [batch], reader=reader(TRUE, TRUE, MADE), predict=predict([2, 0]))
    assert (scores["iou"], scores["images"]) == (1, 1)
    batch.valid[:] = False
    with pytest.raises(ValueError, match="no usable prompt"):
        fakes.run(evaluator, [batch], reader=reader(TRUE, TRUE, MADE), predict=predict([2, 0]))


def test_bad_input():
    with pytest.raises(ValueError, match="kind='depth'"):
        few_shot.Evaluator(kind="depth")
    with pytest.raises(ValueError, match="same colour"):
        few_shot.Evaluator(kind="detection", background=(1, 1, 1))
    evaluator = few_shot.Evaluator(kind="segmentation")
    batch = fakes.prompt_batch([[PHOTO, MASK1, PHOTO, MASK1]], [TRUE])
    with pytest.raises(ValueError, match="2 . shots . 1"):
        evaluator.check(batch)
    with pytest.raises(ValueError, match="2 . shots . 1"):
        fakes.run(evaluator, [batch], reader=reader(TRUE), predict=predict([0]))
    batch = fakes.prompt_batch([[PHOTO, MASK1, PHOTO]], [TRUE])
    batch.hosts[0] = dataclasses.replace(batch.hosts[0], truth=answer.Answer())
    with pytest.raises(ValueError, match="no true answer"):
        fakes.run(evaluator, [batch], reader=reader(TRUE), predict=predict([0]))
    with pytest.raises(ValueError, match="formatter"):
        fakes.run(
            evaluator,
            [fakes.batch_of({"x": np.ones(1)})],
            reader=reader(TRUE),
            predict=predict([0]),
        )
