"""Generated answers: tokens, boxes and masks of the reference, cached against plain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems import nextchat_golden as golden
from vlm_jax.data import geometry
from vlm_jax.models import sam
from vlm_jax.systems.nextchat import generation, task

IO = golden.io()
TASK = task.NextChatTask(golden.MASKS)


def batch_of(name):
    """(tokens, images, boxes, validity) of a golden prompt."""
    tokens = IO[f"{name}_input_ids"].astype(np.int32)
    boxes = IO.get(f"{name}_loc_inputs", np.zeros((0, 4), np.float32))
    slots = np.zeros((len(tokens), 4, 4), np.float32)
    slots[0, : len(boxes)] = boxes
    valid = np.zeros(slots.shape[:2], bool)
    valid[0, : len(boxes)] = True
    return tokens, golden.channels_last(IO[f"{name}_images"]), slots, valid


def answered(name, num_new, layout="inference", valid=None, num_slots=4):
    tokens, images, boxes, box_valid = batch_of(name)
    seen = np.ones(tokens.shape, bool) if valid is None else valid

    @jax.jit
    def run(params):
        module = TASK.bind(params)
        x_btd = module.inputs(tokens, images, boxes, box_valid)
        made = generation.answer(
            module, x_btd, jnp.asarray(seen), jax.random.key(0),
            num_new=num_new, eos_id=2, num_slots=num_slots,
        )  # fmt: skip
        return made, x_btd

    params = golden.params(golden.MASKS)
    if layout == "inference":
        params = jax.jit(TASK.inference_params)(params)
    return jax.tree.map(np.asarray, run(params)) + (params,)


@pytest.mark.parametrize("layout", ["training", "inference"])
@pytest.mark.parametrize("name, num_new", [("gen", 20), ("region", 16)])
def test_answers_of_the_reference(name, num_new, layout):
    made, x_btd, params = answered(name, num_new, layout)
    golden.close(x_btd, IO[f"{name}_prompt_embeds"])
    np.testing.assert_array_equal(made.tokens_bt[0], IO[f"{name}_sequences"][0, 1:])
    count = len(IO[f"{name}_locs"])
    assert made.valid_bk.sum() == count and made.lost_b == 0
    golden.close(made.states_bkd[0, :count], IO[f"{name}_at_hidden"])
    golden.close(made.boxes_bkx[0, :count], IO[f"{name}_locs"])

    @jax.jit
    def masks(params, sam_byxc):
        module = TASK.bind(params)
        encoding = module.encode_for_masks(sam_byxc)
        return module.masks(encoding, made.states_bkd, made.boxes_bkx)

    logits, iou = masks(params, golden.channels_last(IO[f"{name}_images_sam"]))
    large = np.asarray(sam.upsample(logits, 128))[0, :count]
    golden.close(large, IO[f"{name}_masks"][:, 0])
    golden.close(np.asarray(iou)[0, :count], IO[f"{name}_iou"][:, 0])
    # In pixels of the photo as it was given.
    image = IO["image_a" if name == "gen" else "image_c"]
    square = geometry.Square(image.shape[:2])
    golden.close(square.boxes_out(made.boxes_bkx[0, :count]), IO[f"{name}_boxes_pixels"])
    for mask, expected in zip(large, IO[f"{name}_masks_pixels"]):
        found = square.mask_out(mask)
        assert (found != (expected > 0)).mean() < 2e-3


def test_two_prompts_padded_on_the_left():
    made, _, _ = answered("batch", 10, valid=IO["batch_attention_mask"] > 0)
    # The base class, which made these, feeds no boxes back: equal up to the first `<at>`.
    for row, expected in zip(made.tokens_bt, IO["batch_sequences"][:, 1:]):
        at = np.flatnonzero(expected == golden.CFG.at_id)
        end = at[0] + 2 if len(at) else len(expected)
        np.testing.assert_array_equal(row[: end - 1], expected[: end - 1])


def test_locations_beyond_the_slots_are_counted():
    made, _, _ = answered("gen", 20, num_slots=1)
    assert made.valid_bk.tolist() == [[True]] and made.lost_b.tolist() == [1]
    golden.close(made.boxes_bkx[0], IO["gen_locs"][:1])


# ---- places in squares ------------------------------------------------------------------------


@pytest.mark.parametrize("name", "abc")
def test_squares_of_the_reference(name):
    image = IO[f"image_{name}"]
    square = geometry.Square(image.shape[:2])
    from vlm_jax.models import clip

    np.testing.assert_allclose(
        clip.normalize(square.image_in(image, 56)), IO[f"prep_{name}_clip"].transpose(1, 2, 0),
        atol=1e-5,
    )  # fmt: skip
    canvas, place = square.canvas(image, 128)
    golden_sam = IO[f"prep_{name}_sam"].transpose(1, 2, 0)
    np.testing.assert_allclose(sam.normalize(canvas[None], place[None])[0], golden_sam, atol=1e-5)
    boxes = IO[f"prep_{name}_boxes_in"]
    if np.all((boxes >= 0) & (boxes <= np.float32([*image.shape[1::-1]] * 2))):
        np.testing.assert_allclose(square.boxes_in(boxes), IO[f"prep_{name}_boxes_norm"], atol=1e-6)
        np.testing.assert_allclose(square.boxes_out(square.boxes_in(boxes)), boxes, atol=1e-4)
    mask = IO[f"prep_{name}_mask_in"]
    np.testing.assert_array_equal(square.mask_in(mask, 128), IO[f"prep_{name}_mask_sam"])


@pytest.mark.parametrize(
    "boxes, message",
    [
        ([[1, 2, 3]], "shape"),
        ([1, 2, 3, 4], "shape"),
        ([[1, 2, float("nan"), 4]], "not finite"),
        ([[5, 2, 3, 4]], "ends before it begins"),
        ([[100, 2, 130, 4]], "outside of the image of 20 x 10"),
        ([["a", 2, 3, 4]], "are no numbers"),
    ],
)
def test_boxes_that_are_none(boxes, message):
    with pytest.raises(ValueError, match=message):
        geometry.Square((10, 20)).boxes_in(boxes)


def test_boxes_that_reach_beyond_are_cut():
    found = geometry.Square((10, 20)).boxes_in([[-5, 2, 30, 20]])
    np.testing.assert_allclose(found, [[0, 7 / 20, 1, 1]], atol=1e-6)
