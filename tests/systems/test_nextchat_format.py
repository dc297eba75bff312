"""Rows of conversations: tokens, boxes, masks of the reference; what is wrong is named."""

import functools

import jax
import numpy as np
import pytest

from tests.systems import nextchat_golden as golden
from vlm_jax.data import annotations, records
from vlm_jax.models import clip, sam
from vlm_jax.systems import nextchat

pytest.importorskip("sentencepiece")
IO, TEXTS = golden.io(), golden.texts()
FIELDS = dict(
    tokenizer=str(golden.FOLDER / "tokenizer.model"), image_size=56, max_tokens=256, locations=6
)


def formatter(**fields):
    return nextchat.make_formatter(**{**FIELDS, **fields})


def rows(made, *records_):
    return [made(record, np.random.default_rng(0)) for record in records_]


def record(**fields):
    return {
        "image_u8": IO["image_a"],
        "turns": ["<image> Where is the dog?", "Answer: <at> <boxes> ."],
        "boxes_px": [[5.25, 7, 54, 39.5]],
        **fields,
    }


def test_the_case_of_the_reference():
    case = TEXTS["cases"][0]
    assert case["name"] == "rec" and case["mode"] == "train"
    turns = ["<image> Where is the small red kite in the image?", "Answer: <at> <boxes> ."]
    (row,) = rows(formatter(), record(turns=turns))
    ids, labels = case["input_ids"], np.array(case["labels"])
    count = len(ids) - 1
    assert row["tokens"][:count].tolist() == ids[:-1] and not row["tokens"][count:].any()
    assert row["targets"][:count].tolist() == ids[1:]
    np.testing.assert_array_equal(row["weights"][:count] > 0, labels[1:] != -100)
    assert row["token_valid"].sum() == count
    np.testing.assert_allclose(row["boxes"][0], case["loc_inputs"][0], atol=1e-6)
    assert row["box_valid"].tolist() == [True] + [False] * 5
    image = clip.normalize(row["image_u8"])
    np.testing.assert_allclose(image, IO["prep_a_clip"].transpose(1, 2, 0), atol=1e-5)
    host = row["host"]
    assert host.size == (44, 60) and host.truth.text == "Answer: <at> <boxes> ."
    np.testing.assert_allclose(host.truth.boxes_xyxy_px, [[5.25, 7, 54, 39.5]], atol=1e-4)


def test_masks_in_sams_square():
    mask = IO["prep_a_mask_in"] > 0
    rle = annotations.encode_rle(mask)
    two = ["Where are they?", "Here: <at> <boxes> and <at> <boxes> ."]
    made = formatter(sam_size=128, masks=3)
    (row,) = rows(
        made,
        record(
            turns=two,
            boxes_px=[[1, 1, 9, 9], [5, 5, 30, 30]],
            masks=[None, {"size": list(rle.size), "counts": rle.counts}],
        ),
    )
    assert row["mask_valid"].tolist() == [False, True, False]
    np.testing.assert_array_equal(row["masks"][1], IO["prep_a_mask_sam"])
    normalized = sam.normalize(row["sam_u8"][None], row["sam_place"][None])[0]
    np.testing.assert_allclose(normalized, IO["prep_a_sam"].transpose(1, 2, 0), atol=1e-5)
    polygon = [[10, 10, 40, 10, 40, 30, 10, 30]]
    (other,) = rows(made, record(masks=[polygon]))
    assert 0.5 < other["masks"][0].sum() / (30 * 20 * (128 / 60) ** 2) < 1.5


def test_the_rows_train_the_task():
    made = formatter(sam_size=128)
    task = nextchat.make_task(
        dict(vision=dict(preset="tiny"), decoder=dict(preset="tiny"), sam=dict(preset="tiny"))
    )
    question = record(
        turns=["What is <at> <boxes>?", "a dog", "Where?", "There: <at> <boxes> ."],
        boxes_px=[[1, 1, 30, 30], [2, 2, 20, 20]],
        masks=[[[2, 2, 20, 2, 20, 20]]],
    )
    examples = rows(made, question, record())
    for example in examples:
        example.pop("host")
    batch = {key: np.stack([x[key] for x in examples]) for key in examples[0]}
    task.check_batch(batch)


def test_answers_come_back_in_pixels():
    made = formatter()
    examples = rows(made, record(), record(image_u8=IO["image_b"], boxes_px=[[1, 2, 30, 50]]))
    outputs = {key: np.stack([x[key] for x in examples]) for key in ("boxes", "box_valid")}
    said = made.read(outputs, [x["host"] for x in examples])
    np.testing.assert_allclose(said[0].boxes_xyxy_px, [[5.25, 7, 54, 39.5]], atol=1e-4)
    np.testing.assert_allclose(said[1].boxes_xyxy_px, [[1, 2, 30, 50]], atol=1e-4)
    logits = np.full((2, 6, 32, 32), -1.0)
    logits[0, 0, :, :16] = 1  # the left half of the square
    (masked, _) = made.read({**outputs, "mask_logits": logits}, [x["host"] for x in examples])
    found = annotations.decode(masked.masks[0])
    assert found.shape == (44, 60) and found[:, :29].all() and not found[:, 31:].any()


def test_generated_answers_are_read():
    """What the reference says to its first prompt, from the record to the answer in pixels."""
    made = formatter(sam_size=128)
    (row,) = rows(made, record(turns=[f"<image> {TEXTS['gen_prompt']}", "Answer: <at> <boxes> ."]))
    host = row.pop("host")
    mask = annotations.encode_rle(IO["prep_a_mask_in"] > 0)
    (masked,) = rows(made, record(masks=[{"size": mask.size, "counts": mask.counts}]))
    assert masked["host"].truth.masks == (mask,)
    parts = dict.fromkeys(("vision", "decoder", "sam"), dict(preset="tiny"))
    task = nextchat.make_task(parts)
    batch = {key: x[None] for key, x in row.items()}
    predict = functools.partial(task.predict["answer"], max_tokens=20, locations=4)
    found = jax.jit(predict)(golden.params(golden.MASKS), batch, jax.random.key(0))
    np.testing.assert_array_equal(found["tokens"][0], IO["gen_sequences"][0, 1:])
    (said,) = made.read(jax.tree.map(np.asarray, found), [host])
    assert said.text.count("<at> <boxes>") == 2 and said.problem == "cut off after 20 tokens"
    np.testing.assert_allclose(said.boxes_xyxy_px, IO["gen_boxes_pixels"], atol=1e-2)
    for one, expected in zip(said.masks, IO["gen_masks_pixels"]):
        np.testing.assert_array_equal(annotations.decode(one), expected > 0)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(turns="Where?"), "turns is 'Where"),
        (dict(boxes_px=[]), "1 locations in the text, and 0 boxes"),
        (dict(boxes_px=[[1, 1, 5, 5]] * 9), "9 locations, and formatter.locations is 6"),
        (dict(boxes_px=[[9, 1, 5, 5]]), "boxes_px: box 0, .* ends before it begins"),
        (dict(boxes_px=[[1, 1, float("nan"), 5]]), "boxes_px: .*not finite"),
        (dict(boxes_px=[[100, 1, 150, 5]]), "boxes_px: .*outside of the image"),
        (dict(turns=["Where?", "x " * 400 + "<at> <boxes>"]), "formatter.max_tokens is 256"),
        (dict(masks=[None, [[1, 1, 9, 1, 9, 9]]]), "2 masks, and 1 locations in answers"),
        (dict(masks=[[[1, 1, 1, 1, 1, 1]]]), "mask 0 is empty"),
        (dict(masks=[{"size": [1, 2], "counts": [2]}]), r"mask 0: a mask of \(1, 2\)"),
        (dict(masks=[{"counts": [2]}]), "mask 0: 'size'"),
        (dict(image_u8=np.zeros((4, 4), np.uint8)), "image_u8 is uint8"),
    ],
)
def test_bad_records_are_named(fields, message):
    with pytest.raises(records.BadRecordError, match=message):
        rows(formatter(sam_size=128), record(**fields))


def test_bad_settings():
    with pytest.raises(ValueError, match="image_size=50 is not a multiple"):
        formatter(image_size=50)
    with pytest.raises(ValueError, match="locations"):
        formatter(locations=0)
