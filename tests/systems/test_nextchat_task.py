"""NExT-Chat's task: the reference's loss and gradients, mixed batches, what it refuses."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from tests.systems import nextchat_golden as golden
from vlm_jax.models import clip, llama, sam
from vlm_jax.nn import functional
from vlm_jax.ops import losses
from vlm_jax.program import config as config_lib
from vlm_jax.program import optim
from vlm_jax.systems.nextchat import network, weights
from vlm_jax.systems.nextchat import task as task_lib

CFG = golden.CFG
MODEL = dict(vision=dict(preset="tiny"), decoder=dict(preset="tiny"))


def as_u8(images, mean, std, largest=255):
    """The photos of normalised images."""
    pixels = golden.channels_last(images) * np.array(std) + np.array(mean)
    return np.rint(pixels * largest).astype(np.uint8)


def training_batch(num_slots=4):
    """The reference's five real rows: REC, caption with boxes, region, pointing, VQA."""
    io = golden.io()
    tokens = io["train_input_ids"][:5].astype(np.int32)
    labels = np.pad(io["train_labels"][:5, 1:], ((0, 0), (0, 1)), constant_values=-100)
    counts = (tokens == CFG.boxes_id).sum(axis=1)
    boxes, valid = golden.boxes_of_rows(io["train_loc_inputs"][: counts.sum()], counts)
    short = ((0, 0), (0, num_slots - boxes.shape[1]))
    return {
        "image_u8": as_u8(io["train_images"][:5], clip.MEAN, clip.STD),
        "tokens": tokens,
        "targets": np.maximum(labels, 0).astype(np.int32),
        "weights": (labels != -100).astype(np.float32),
        "token_valid": io["train_attention_mask"][:5] > 0,
        "boxes": np.pad(boxes, (*short, (0, 0))),
        "box_valid": np.pad(valid, short),
    }


def mask_batch():
    """The reference's two rows of stage 3."""
    io = golden.io()
    tokens = io["seg_input_ids"].astype(np.int32)
    labels = np.pad(io["seg_labels"][:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    sizes = np.floor(io["seg_img_size"] * 128 / io["seg_img_size"].max(1, keepdims=True) + 0.5)
    (y0, x0), (h, w) = ((128 - sizes) // 2).T, sizes.T
    return {
        "image_u8": as_u8(io["seg_images"], clip.MEAN, clip.STD),
        "tokens": tokens,
        "targets": np.maximum(labels, 0).astype(np.int32),
        "weights": (labels != -100).astype(np.float32),
        "token_valid": io["seg_attention_mask"] > 0,
        "boxes": io["seg_loc_inputs"][:, None],
        "box_valid": np.ones((2, 1), bool),
        "sam_u8": as_u8(io["seg_images_sam"], sam.MEAN, sam.STD, 1),
        "sam_place": np.stack([x0, y0, x0 + w, y0 + h], axis=1).astype(np.int32),
        "masks": io["seg_masks_sam"].astype(np.uint8),  # the sum of polygons: up to 2
        "mask_valid": np.ones((2, 1), bool),
    }


def rows(batch, index):
    return {key: x[index] for key, x in batch.items()}


@pytest.fixture(scope="module")
def batch():
    return training_batch()


@pytest.fixture(scope="module")
def task():
    return task_lib.make_task(MODEL, giou_mean="ordered")


def learned_and_frozen(stage=1):
    cfg = golden.MASKS if stage == 3 else CFG
    return optim.split(golden.params(cfg), task_lib.TRAINED[stage])


def value_and_grad(task, batch, stage=1):
    """(terms, gradients of their sum by path) over the checkpoint."""
    learned, frozen = learned_and_frozen(stage)

    @jax.jit
    def run(learned):
        def total(learned):
            terms, metrics = task.loss(optim.merge(learned, frozen), batch, None)
            return losses.value(terms), (terms, metrics)

        return jax.grad(total, has_aux=True)(learned)

    grads, (terms, metrics) = run(learned)
    return terms, metrics, grads


def in_their_form(grads, cfg=CFG):
    """Gradients under the reference's names."""
    tree = {path: np.zeros_like(x) for path, x in functional.flatten(golden.params(cfg)).items()}
    tree |= {path: np.asarray(x) for path, x in grads.items()}
    return {name: load() for name, load in weights.to_upstream(functional.unflatten(tree)).items()}


@pytest.fixture(scope="module")
def trained(task, batch):
    return value_and_grad(task, batch)


def test_every_loss_of_stages_1_and_2(trained):
    io, terms = golden.io(), trained[0]
    scales = dict(text=1, box_l1=2, box_giou=0.2, cycle_state=1, cycle_box=1)
    assert {name: term.scale for name, term in terms.items()} == scales
    for name, theirs in (
        ("text", "lm"), ("box_l1", "l1"), ("box_giou", "giou"),
        ("cycle_state", "cycle_embed_mse"), ("cycle_box", "cycle_loc_l1"),
    ):  # fmt: skip
        value = float(terms[name].mean) / scales[name]
        assert value == pytest.approx(float(io[f"train_loss_{theirs}"]), rel=1e-4), name
    assert float(losses.value(terms)) == pytest.approx(float(io["train_loss_total"]), rel=1e-4)


def test_gradients_of_stages_1_and_2(trained):
    theirs = in_their_form(trained[2])
    compared = {key.removeprefix("train_grad__"): x for key, x in golden.io().items()
                if key.startswith("train_grad__")}  # fmt: skip
    assert len(compared) == 12
    for name, expected in compared.items():
        bound = 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(theirs[name], expected, rtol=0, atol=bound, err_msg=name)
    norms = golden.texts()["train_grad_l2_norms"]
    assert len(norms) == 33
    for name, norm in norms.items():
        assert np.linalg.norm(theirs[name]) == pytest.approx(norm, rel=2e-3), name


def test_what_stages_1_and_2_train_is_what_the_reference_trains():
    ones = {path: np.ones_like(x) for path, x in learned_and_frozen()[0].items()}
    names = {name for name, x in in_their_form(ones).items() if np.any(x)}
    assert names == set(golden.texts()["trainable_stage12"])


STAGE3 = dict(text_weight=0.0, l1_weight=0.0, giou_weight=0.0, cycle_weight=0.0)
MASKS = MODEL | dict(sam=dict(preset="tiny"))


@pytest.fixture(scope="module")
def of_masks():
    task = task_lib.make_task(MASKS, **STAGE3, masks_per_device=2)
    return task, *value_and_grad(task, mask_batch(), stage=3)


def test_every_loss_of_stage_3(of_masks):
    io, terms, metrics = golden.io(), *of_masks[1:3]
    assert {name: term.scale for name, term in terms.items()} == {
        "mask_focal": 20, "mask_dice": 1, "mask_iou": 1,
    }  # fmt: skip
    for name, expected in (
        ("mask_focal", 20 * io["seg_loss_focal_each"].sum()),
        ("mask_dice", io["seg_loss_dice_each"].sum()),
        ("mask_iou", io["seg_loss_iou"]),
    ):
        assert float(terms[name].mean) == pytest.approx(float(expected), rel=1e-4), name
    assert float(losses.value(terms)) == pytest.approx(float(io["seg_loss_total"]), rel=1e-4)
    overlap = float(metrics["mask_overlap"].mean)
    assert overlap == pytest.approx(float(io["seg_true_iou"].mean()), rel=1e-4)


def test_gradients_of_stage_3(of_masks):
    theirs = in_their_form(of_masks[3], golden.MASKS)
    compared = {key.removeprefix("seg_grad__"): x for key, x in golden.io().items()
                if key.startswith("seg_grad__")}  # fmt: skip
    assert len(compared) == 6
    for name, expected in compared.items():
        bound = 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(theirs[name], expected, rtol=0, atol=bound, err_msg=name)
    norms = golden.texts()["seg_grad_l2_norms"]
    assert len(norms) == 124
    largest = max(norm for norm in norms.values() if norm)
    for name, norm in norms.items():  # None: in no graph, as the heads of masks 1 to 3
        found = np.linalg.norm(theirs[name])
        assert found == pytest.approx(norm or 0, rel=2e-3, abs=1e-6 * largest), name


def test_what_stage_3_trains_is_what_the_reference_trains():
    ones = {path: np.ones_like(x) for path, x in learned_and_frozen(3)[0].items()}
    names = {name for name, x in in_their_form(ones, golden.MASKS).items() if np.any(x)}
    assert names == set(golden.texts()["trainable_stage3"])
    abstract = network.make(network.PRESETS["7b_336_masks"]).abstract()
    learned, _ = optim.split(abstract, task_lib.TRAINED[3])
    assert sum(x.size for x in learned.values()) == 25_034_980


def test_masks_by_the_number_in_the_batch_as_released(of_masks):
    counted = task_lib.make_task(MASKS, **STAGE3, masks_per_device=0)
    terms, _, _ = value_and_grad(counted, mask_batch(), stage=3)
    for name, term in terms.items():
        assert float(term.mean) == pytest.approx(float(of_masks[1][name].mean), rel=1e-5), name


def both_in_one_row():
    """A row whose answer has two locations with a mask each, and the same as two rows of one."""
    two = mask_batch()
    token = {key: two[key][:1].copy() for key in two}
    place = int(np.flatnonzero(token["tokens"][0] == CFG.at_id)[0])
    for key, extra in (("tokens", [CFG.at_id, CFG.boxes_id]), ("targets", None),
                       ("weights", None), ("token_valid", None)):  # fmt: skip
        row = token[key][0]
        middle = row[place : place + 2] if extra is None else extra
        token[key] = np.concatenate([row[: place + 2], middle, row[place + 2 :]])[None][
            :, : row.size
        ]
    token["targets"] = np.roll(token["tokens"], -1, axis=1)
    token["boxes"] = two["boxes"].reshape(1, 2, 4)
    token["box_valid"] = token["mask_valid"] = np.ones((1, 2), bool)
    token["masks"] = two["masks"].reshape(1, 2, 128, 128) > 0
    return token


def test_several_masks_of_one_image_train_together():
    """Each location has its loss; the other's mask being there or not changes nothing."""
    task, batch = task_lib.make_task(MASKS, **STAGE3), both_in_one_row()
    task.check_batch(batch)

    def alone(k):
        valid = np.arange(2)[None] == k
        terms, _, _ = value_and_grad(task, dict(batch, mask_valid=valid), stage=3)
        return terms

    terms, _, grads = value_and_grad(task, batch, stage=3)
    parts = [alone(0), alone(1)]
    for name, term in terms.items():
        assert float(term.weight) == 2
        totals = [float(part[name].total) for part in parts]
        assert float(term.total) == pytest.approx(sum(totals), rel=1e-4), name
        assert totals[0] != pytest.approx(totals[1], rel=1e-3)  # two masks, two losses
    assert all(np.all(np.isfinite(x)) for x in grads.values())


def test_words_boxes_and_masks_in_one_batch_are_the_tasks_apart(batch):
    """Rows of stages 1 and 2, which have no masks, beside those of stage 3."""
    task = task_lib.make_task(MASKS)
    masks = mask_batch()
    length, slots = batch["tokens"].shape[1], batch["boxes"].shape[1]
    wide = {key: np.pad(masks[key], ((0, 0), (0, length - masks[key].shape[1])))
            for key in ("tokens", "targets", "weights", "token_valid")}  # fmt: skip
    wide["boxes"] = np.pad(masks["boxes"], ((0, 0), (0, slots - 1), (0, 0)))
    wide["box_valid"] = np.pad(masks["box_valid"], ((0, 0), (0, slots - 1)))
    third = {**masks, **wide}
    shape = {key: (5, *x.shape[1:]) for key, x in third.items()}
    first = {key: batch.get(key, np.zeros(shape[key], x.dtype)) for key, x in third.items()}
    mixed = {key: np.concatenate([first[key], third[key]]) for key in third}

    def sums(batch):
        terms, _ = jax.jit(lambda params: task.loss(params, batch, None))(
            golden.params(golden.MASKS)
        )
        return {name: (float(term.total), float(term.weight)) for name, term in terms.items()}

    together, apart = sums(mixed), (sums(first), sums(third))
    assert len(together) == 8
    for name, (total, weight) in together.items():
        assert weight == apart[0][name][1] + apart[1][name][1] > 0
        assert total == pytest.approx(apart[0][name][0] + apart[1][name][0], rel=1e-4), name
    assert apart[0]["mask_dice"] == (0, 0)


def test_predicted_masks_in_both_layouts():
    task, batch, io = task_lib.make_task(MASKS), mask_batch(), golden.io()
    params = golden.params(golden.MASKS)
    for layout in (params, task.inference_params(params)):
        found = jax.jit(task.predict["masks"])(layout, batch, None)
        golden.close(found["mask_logits"], io["seg_low_res"], scale=1e-3)
        golden.close(found["mask_iou"], io["seg_iou_pred"], scale=1e-3)
    assert "masks" not in task_lib.make_task(MODEL).predict


def test_batches_with_masks_are_looked_at():
    task, batch = task_lib.make_task(MASKS), mask_batch()
    with pytest.raises(config_lib.ConfigError, match="values up to 2"):
        task.check_batch(batch)
    batch["masks"] = np.minimum(batch["masks"], 1)
    task.check_batch(batch)
    more = dict(batch, mask_valid=np.ones((2, 3), bool), masks=np.repeat(batch["masks"], 3, 1))
    with pytest.raises(config_lib.ConfigError, match="3 masks and 1 locations in its answer"):
        task.check_batch(more)
    empty = dict(batch, masks=0 * batch["masks"])
    with pytest.raises(config_lib.ConfigError, match="a mask of the first batch is empty"):
        task.check_batch(empty)
    with pytest.raises(config_lib.ConfigError, match=r"images of \(64, 64\)"):
        task.check_batch(dict(batch, sam_u8=batch["sam_u8"][:, ::2, ::2]))


def test_two_rows_are_learned_by_heart():
    """Words, boxes and masks together, from the reference's random weights."""
    task, batch = task_lib.make_task(MASKS, masks_per_device=2), mask_batch()
    batch["masks"] = np.minimum(batch["masks"], 1)
    everything = f"{task_lib.TRAINED[1]}|{task_lib.TRAINED[3]}"
    learned, frozen = optim.split(golden.params(golden.MASKS), everything)
    schedule = optax.cosine_decay_schedule(3e-3, 200)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def update(learned, state):
        def total(learned):
            terms, metrics = task.loss(optim.merge(learned, frozen), batch, None)
            return losses.value(terms), metrics

        grads, metrics = jax.grad(total, has_aux=True)(learned)
        updates, state = optimizer.update(grads, state, learned)
        return optax.apply_updates(learned, updates), state, losses.means(metrics)

    state, history = optimizer.init(learned), []
    for _ in range(200):
        learned, state, metrics = update(learned, state)
        history.append(metrics)
    first, last = (jax.tree.map(float, x) for x in (history[0], history[-1]))
    assert first["accuracy"] == 0 and first["box_iou"] < 0.5 and first["mask_overlap"] < 0.1
    assert last["accuracy"] == 1 and last["box_iou"] > 0.9 and last["mask_overlap"] > 0.9


def test_losses_in_bfloat16_are_near():
    """Of 8 bits of fraction; measured: at most .028 of a term's value."""
    parts = {name: dict(preset="tiny", dtype="bfloat16") for name in MASKS}
    batch, params = mask_batch(), golden.params(golden.MASKS)
    exact, rounded = (
        jax.jit(lambda task=task: task.loss(params, batch, None)[0])()
        for task in (task_lib.make_task(model, masks_per_device=2) for model in (MASKS, parts))
    )
    for name, term in exact.items():
        assert rounded[name].total.dtype == np.float32
        assert float(rounded[name].mean) == pytest.approx(float(term.mean), rel=0.05), name


def test_chunks_of_logits_change_nothing(trained, batch):
    terms, _, grads = value_and_grad(
        task_lib.make_task(MODEL, giou_mean="ordered", loss_chunk=32), batch
    )
    assert float(terms["text"].mean) == pytest.approx(float(trained[0]["text"].mean), rel=1e-5)
    for path, x in grads.items():
        np.testing.assert_allclose(x, trained[2][path], atol=1e-5, err_msg=path)


def sums(task, batch):
    terms, _ = jax.jit(lambda params: task.loss(params, batch, None))(golden.params())
    return {name: (float(term.total), float(term.weight)) for name, term in terms.items()}


def test_a_batch_of_mixed_tasks_equals_the_tasks_apart(task, batch):
    """Five rows of five tasks; sums and weights of each term add up row by row."""
    whole, apart = sums(task, batch), [sums(task, rows(batch, [i])) for i in range(5)]
    for name, (total, weight) in whole.items():
        assert total == pytest.approx(sum(one[name][0] for one in apart), rel=1e-4), name
        assert weight == sum(one[name][1] for one in apart), name
    assert {one["box_l1"][1] for one in apart} > {0.0}  # a row without any box


def test_more_slots_and_other_padding_change_nothing(task, batch):
    wide = training_batch(num_slots=9)
    wide["boxes"] = np.where(wide["box_valid"][..., None], wide["boxes"], np.nan)
    for name, (total, weight) in sums(task, wide).items():
        assert (total, weight) == pytest.approx(sums(task, batch)[name], rel=1e-5), name


def test_boxes_behind_at_are_never_learned_as_words(task, batch):
    """The labels of the reference still have them; its model takes them out, and so does ours."""
    as_words = (batch["targets"] == CFG.boxes_id) & (batch["weights"] > 0)
    assert as_words.sum() == 5
    without = dict(batch, weights=np.where(as_words, 0, batch["weights"]))
    assert sums(task, without)["text"] == sums(task, batch)["text"]


def test_weights_of_zero_compute_nothing(batch):
    only = task_lib.make_task(MODEL, text_weight=0.0, cycle_weight=0.0)
    assert set(sums(only, batch)) == {"box_l1", "box_giou"}
    text = task_lib.make_task(MODEL, l1_weight=0.0, giou_weight=0.0, cycle_weight=0.0)
    assert set(sums(text, batch)) == {"text"}


def test_predicted_boxes_in_both_layouts(task, batch):
    expected = golden.io()["train_pred_locs"][:-1]
    own, decoding = (
        jax.jit(task.predict["boxes"])(params, batch, None)
        for params in (golden.params(), task.inference_params(golden.params()))
    )
    golden.close(decoding["boxes"], own["boxes"])
    answers = np.zeros_like(batch["box_valid"])
    for row, ids in enumerate(batch["tokens"]):
        for k, place in enumerate(np.flatnonzero(ids == CFG.at_id)):
            answers[row, k] = batch["weights"][row, place - 1] > 0
    np.testing.assert_array_equal(own["box_valid"], answers)  # not those of questions
    golden.close(np.asarray(own["boxes"])[answers], expected)


def row_of(name):
    """A prompt of the reference as a row: its ids, then an answer that nobody reads."""
    io, num_slots = golden.io(), 3
    ids = io[f"{name}_input_ids"].astype(np.int32)
    answer = np.array([[7, 8, 2]], np.int32)  # behind the prompt, with weights
    tokens = np.concatenate([ids, answer, np.zeros((1, 5), np.int32)], axis=1)
    prompt, length = ids.shape[1], tokens.shape[1]
    boxes = io[f"{name}_loc_inputs"]
    row = {
        "image_u8": as_u8(io[f"{name}_images"], clip.MEAN, clip.STD),
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": ((np.arange(length) >= prompt - 1) & (np.arange(length) < prompt + 2))[
            None
        ].astype(np.float32),
        "token_valid": (np.arange(length) < prompt + 3)[None],
        "boxes": np.pad(boxes, ((0, num_slots - len(boxes)), (0, 0)))[None],
        "box_valid": (np.arange(num_slots) < len(boxes))[None],
    }
    place = {"gen": (0, 17, 128, 111), "region": (0, 0, 128, 128)}[name]
    row["sam_u8"] = as_u8(io[f"{name}_images_sam"], sam.MEAN, sam.STD, 1)
    return row | {"sam_place": np.array([place], np.int32)}


@pytest.mark.parametrize("name, count", [("gen", 20), ("region", 16)])
def test_answers_generated_from_rows(name, count):
    """What the reference says, with and without regions in the question; boxes and masks of it."""
    task, io = task_lib.make_task(MASKS), golden.io()
    predict = functools.partial(task.predict["answer"], max_tokens=count, locations=4)
    found = jax.jit(predict)(golden.params(golden.MASKS), row_of(name), jax.random.key(0))
    np.testing.assert_array_equal(found["tokens"], io[f"{name}_sequences"][:, 1:])
    valid = np.asarray(found["box_valid"])[0]
    assert valid.sum() == len(io[f"{name}_locs"])
    golden.close(np.asarray(found["boxes"])[0][valid], io[f"{name}_locs"])
    golden.close(np.asarray(found["mask_iou"])[0][valid], io[f"{name}_iou"][:, 0], scale=1e-3)
    logits = sam.upsample(found["mask_logits"], 128)[0][valid]
    golden.close(logits, io[f"{name}_masks"][:, 0], scale=1e-3)


def test_rows_of_other_lengths_are_answered_side_by_side():
    task, rows_of = task_lib.make_task(MODEL), [row_of("gen"), row_of("region")]
    length = max(row["tokens"].shape[1] for row in rows_of)
    keys = ("image_u8", "tokens", "targets", "weights", "token_valid", "boxes", "box_valid")

    def wide(x):
        short = x.ndim == 2 and x.shape[1] > 100
        return np.pad(x, ((0, 0), (0, length - x.shape[1]))) if short else x

    batch = {key: np.concatenate([wide(row[key]) for row in rows_of]) for key in keys}
    predict = functools.partial(task.predict["answer"], max_tokens=16)
    found = jax.jit(predict)(golden.params(), batch, jax.random.key(0))
    for row, name in enumerate(("gen", "region")):
        expected = golden.io()[f"{name}_sequences"][0, 1:17]
        np.testing.assert_array_equal(found["tokens"][row], expected)


def test_an_answer_of_no_token_is_refused(task, batch):
    with pytest.raises(config_lib.ConfigError, match="max_tokens=0"):
        task.predict["answer"](golden.params(), batch, None, max_tokens=0)


def test_scores_are_those_of_the_loss(task, batch):
    logp = jax.jit(task.predict["score"])(golden.params(), batch, None)["logp"]
    weight = np.where(batch["targets"] == CFG.boxes_id, 0, batch["weights"])
    total = -(np.asarray(logp) * weight).sum()
    assert total == pytest.approx(sums(task, batch)["text"][0], rel=1e-5)


def test_the_batch_of_the_reference_is_accepted(task, batch):
    task.check_batch(batch)


def changed(**fields):
    made = {key: x.copy() for key, x in training_batch().items()}
    for key, change in fields.items():
        change(made[key])
    return made


@pytest.mark.parametrize("fields, message", [
    (dict(boxes=lambda x: x.__setitem__((0, 0), (0.5, 0.1, 0.2, 0.9))), "ordered corners"),
    (dict(boxes=lambda x: x.__setitem__((0, 0, 2), 1.2)), "in 0..1"),
    (dict(boxes=lambda x: x.__setitem__((0, 0), np.nan)), "in 0..1"),
    (dict(box_valid=lambda x: x.__setitem__((0, 0), False)), "1 <boxes> tokens and 0 boxes"),
    (dict(box_valid=lambda x: x.__setitem__((4, 0), True)), "0 <boxes> tokens and 1 boxes"),
    (dict(tokens=lambda x: x.__setitem__(x == CFG.at_id, 5)), "does not follow <at>"),
    (dict(tokens=lambda x: x.__setitem__((0, 160), CFG.at_id)), "or the reverse"),
    (dict(tokens=lambda x: x.__setitem__((0, 3), CFG.patch_id)), "17 places of an image"),
    (dict(tokens=lambda x: x.__setitem__((0, 3), 405)), "token id 405"),
    (dict(weights=lambda x: x.fill(0)), "carries loss"),
])  # fmt: skip
def test_batches_that_are_refused(task, fields, message):
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
        task.check_batch(changed(**fields))


def test_images_of_another_size_are_refused(task, batch):
    small = dict(batch, image_u8=batch["image_u8"][:, :28, :28])
    with pytest.raises(config_lib.ConfigError, match="28x28 for a tower of 56"):
        task.check_batch(small)


@pytest.mark.parametrize("model, fields, message", [
    (MODEL | dict(text=1), {}, "unknown key model.text"),
    (dict(vision=dict(preset="l15"), decoder=dict(preset="tiny")), {}, "model.vision.preset='l15'"),
    (MODEL | dict(projector_depth=0), {}, "projector_depth 0"),
    (MODEL, dict(giou_mean="all"), "task.giou_mean='all'"),
    (MODEL | dict(sam=dict(preset="vit_x")), {}, "model.sam.preset='vit_x'"),
    (MODEL, dict(cycle_weight=-1.0), "cycle_weight"),
    (MODEL, dict(masks_per_device=-1), "masks_per_device"),
    (MODEL, dict(text_weight=0.0, l1_weight=0.0, giou_weight=0.0, cycle_weight=0.0), "all weights"),
])  # fmt: skip
def test_impossible_tasks(model, fields, message):
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
        task_lib.make_task(model, **fields)


def test_flops_of_an_update(task, batch):
    """A stage that trains SAM's decoder alone runs all else forward only."""
    rows, length = batch["tokens"].shape
    decoder = rows * length * llama.flops_per_token(CFG.decoder, length)
    tower = rows * CFG.vision.training_flops / 3
    assert task.flops_per_step(batch) == pytest.approx(decoder + tower)
    stage3 = task_lib.make_task(MASKS, **STAGE3)
    encode = rows * stage3.cfg.sam.encode_flops
    assert stage3.flops_per_step(batch) == pytest.approx(decoder / 3 + tower + encode)
    # Of ViT-H; two thirds of a teraflop per pass is 1,280 wide matrices over 4,096 places.
    assert 5e12 < network.SAMS["vit_h"].encode_flops < 7e12


def test_presets_are_what_a_recipe_makes(task):
    assert task.cfg == network.PRESETS["tiny"]


# Compiles an update of the released size on 8 devices, allocating nothing; in a process of its own
# because the partitioner complains on the file descriptor of stderr.
COMPILE = """
import dataclasses, sys
import jax, jax.numpy as jnp
from vlm_jax.ops import partition
from vlm_jax.program import optim, run, sharding, train
from vlm_jax.systems.nextchat import network, task as task_lib

stage, rows, length = int(sys.argv[1]), 8, 768
released = network.PRESETS["7b_336_masks"]
fast = dict(dtype="bfloat16")
cfg = dataclasses.replace(
    released,
    vision=dataclasses.replace(released.vision, depth=4, **fast),
    decoder=dataclasses.replace(released.decoder, remat="full", **fast),
    sam=dataclasses.replace(released.sam, depth=3, global_blocks=(1,), **fast),
)
off = dict.fromkeys(("text_weight", "l1_weight", "giou_weight", "cycle_weight"), 0.0)
task = task_lib.NextChatTask(cfg, loss_chunk=256, **(off if stage == 3 else {}))
mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
recipe = run.Recipe(system="nextchat", model={}, data=None,
                    train=train.TrainConfig(steps=10, batch_size=rows),
                    optim=optim.OptimConfig(trainable=task_lib.TRAINED[stage]))
optimizer = optim.make_optimizer(recipe.optim, 10)
state = jax.eval_shape(lambda: train.init_state(task, optimizer, recipe, jax.random.key(0)))
shardings = train.state_shardings(mesh, task, state)
shapes = dict(
    image_u8=((336, 336, 3), "uint8"), tokens=((length,), "int32"), targets=((length,), "int32"),
    weights=((length,), "float32"), token_valid=((length,), "bool"),
    boxes=((4, 4), "float32"), box_valid=((4,), "bool"),
    sam_u8=((1024, 1024, 3), "uint8"), sam_place=((4,), "int32"),
    masks=((2, 1024, 1024), "uint8"), mask_valid=((2,), "bool"),
)
batch = {key: jax.ShapeDtypeStruct((rows, *shape), dtype) for key, (shape, dtype) in shapes.items()}
everywhere = sharding.replicated(mesh)
step = jax.jit(train.make_train_step(task, optimizer, recipe),
               in_shardings=(shardings, sharding.of_batch(mesh), everywhere),
               out_shardings=(shardings, everywhere), donate_argnums=0)
with partition.use_mesh(mesh):
    step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "3"])
def test_no_involuntary_rematerialization(stage):
    """Of all losses together in stage 1."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    env["TF_CPP_MIN_LOG_LEVEL"] = "0"
    out = subprocess.run(
        [sys.executable, "-c", COMPILE, stage], capture_output=True, text=True, timeout=900,
        env=env, cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    assert "compiled" in out.stdout, out.stderr[-3000:]
    assert not re.search("involuntary full remat", out.stderr, re.IGNORECASE), out.stderr
