"""Losses of boxes, cycles and masks: the reference's values, and what no batch may change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems import nextchat_golden as golden
from vlm_jax.ops import losses as terms_lib
from vlm_jax.systems.nextchat import losses


@pytest.fixture(scope="module")
def io():
    return golden.io()


def box_losses(pred, true, valid=None, giou_mean="ordered"):
    """{name: value} of boxes [N, 4]."""
    valid = np.ones(len(pred), bool) if valid is None else valid
    terms, _ = losses.box_terms(pred[None], true[None], valid[None], giou_mean=giou_mean)
    return {name: float(term.mean) for name, term in terms.items()}


def ordered(boxes):
    return (boxes[:, 2] >= boxes[:, 0]) & (boxes[:, 3] >= boxes[:, 1])


def all_but_the_last(kept):
    """What the released mean counts of these: not the last, unless it is the only one."""
    kept = kept.copy()
    if kept.sum() > 1:
        kept[np.flatnonzero(kept)[-1]] = False
    return kept


@pytest.mark.parametrize("case", range(5))
def test_box_losses_of_the_reference(io, case):
    """Its mean leaves out the last box, a made-up one, or what is last among the ordered ones."""
    pred, true = io[f"boxloss{case}_pred"], io[f"boxloss{case}_target"]
    every = np.ones(len(pred), bool)
    l1 = box_losses(pred, true, all_but_the_last(every))["box_l1"]
    giou = box_losses(pred, true, all_but_the_last(ordered(pred)))["box_giou"]
    assert l1 == pytest.approx(float(io[f"boxloss{case}_l1"]), rel=1e-4)
    assert giou == pytest.approx(float(io[f"boxloss{case}_giou"]), rel=1e-4)
    assert 2 * l1 + 0.2 * giou == pytest.approx(float(io[f"boxloss{case}_total"]), rel=1e-4)


def test_box_losses_of_the_training_batch(io):
    pred, true = io["train_pred_locs"], io["train_loc_targets"]
    found = box_losses(pred, true, all_but_the_last(np.ones(6, bool)))
    assert not np.all(ordered(pred[:-1]))  # the golden has a reversed one
    assert found["box_l1"] == pytest.approx(float(io["train_loss_l1"]), rel=1e-4)
    assert found["box_giou"] == pytest.approx(float(io["train_loss_giou"]), rel=1e-4)


def test_cycle_losses_of_the_training_batch(io):
    def row(name):
        return io[name][None]

    answers, boxes = (all_but_the_last(np.ones(n, bool)) for n in (6, 10))
    found = {}
    for name, valid, ours, again in (
        ("cycle_state", answers, "train_at_hidden", "train_cycle_embeds"),
        ("cycle_box", boxes, "train_loc_inputs", "train_cycle_locs"),
    ):
        a, b, valid = row(ours), row(again), valid[None]
        found[name] = float(losses.cycle_terms(a, b, valid, a, b, valid)[name].mean)
    assert found["cycle_state"] == pytest.approx(float(io["train_loss_cycle_embed_mse"]), rel=1e-4)
    assert found["cycle_box"] == pytest.approx(float(io["train_loss_cycle_loc_l1"]), rel=1e-4)


def test_reversed_boxes_count_in_our_mean_and_get_no_gradient_of_giou():
    true = np.array([[0.1, 0.1, 0.5, 0.5]] * 2, np.float32)
    pred = np.array([[0.1, 0.1, 0.3, 0.5], [0.6, 0.1, 0.2, 0.5]], np.float32)
    assert box_losses(pred, true, giou_mean="ordered")["box_giou"] == pytest.approx(0.5)
    assert box_losses(pred, true, giou_mean="boxes")["box_giou"] == pytest.approx(0.25)

    def giou(pred):
        terms, _ = losses.box_terms(pred[None], true[None], np.ones((1, 2), bool))
        return terms["box_giou"].mean

    grads = jax.grad(giou)(jnp.asarray(pred))
    assert np.any(grads[0]) and not np.any(grads[1])


@pytest.mark.parametrize("pred", [
    [[0.7, 0.7, 0.2, 0.2]], [[np.nan] * 4], [[0.3, 0.3, 0.3, 0.3]], [[0.1, 0.9, 0.2, -0.4]],
])  # fmt: skip
@pytest.mark.parametrize("giou_mean", losses.GIOU_MEANS)
def test_giou_is_finite_whatever_is_predicted(pred, giou_mean):
    pred = jnp.asarray(pred, jnp.float32)[None]
    true = jnp.full((1, 1, 4), 0.3)  # no area

    def giou(pred):
        return losses.box_terms(pred, true, np.ones((1, 1), bool), giou_mean=giou_mean)[0][
            "box_giou"
        ].mean

    value, grads = jax.value_and_grad(giou)(pred)
    assert np.isfinite(value) and np.all(np.isfinite(grads))


def test_nothing_to_count_is_zero():
    nobody = np.zeros((2, 3), bool)
    broken = np.full((2, 3, 4), np.nan, np.float32)
    boxes, _ = losses.box_terms(broken, broken, nobody)
    cycles = losses.cycle_terms(broken, broken, nobody, broken, broken, nobody)
    masks, _ = losses.mask_terms(
        np.full((2, 3, 4, 4), np.nan, np.float32), broken[..., 0],
        np.zeros((2, 3, 4, 4), np.uint8), nobody, masks_per_device=0,
    )  # fmt: skip
    for name, term in {**boxes, **cycles, **masks}.items():
        assert float(term.mean) == 0 == float(term.weight), name


def seg(io):
    return (
        jnp.asarray(io["seg_pred_masks"]), jnp.asarray(io["seg_iou_pred"]),
        jnp.asarray(io["seg_masks_sam"]), np.ones((2, 1), bool),
    )  # fmt: skip


SCALES = {"mask_focal": 20, "mask_dice": 1, "mask_iou": 1}


@pytest.mark.parametrize("masks_per_device", [0, 2])
def test_mask_losses_of_the_reference(io, masks_per_device):
    """Its batch had two masks: as a constant, or counted."""
    terms, _ = losses.mask_terms(*seg(io), masks_per_device=masks_per_device)
    for name, expected in (
        ("mask_focal", io["seg_loss_focal_each"].sum()),
        ("mask_dice", io["seg_loss_dice_each"].sum()),
        ("mask_iou", io["seg_loss_iou"]),
    ):
        assert float(terms[name].mean) == pytest.approx(float(expected), rel=1e-4), name
    total = sum(SCALES[name] * term.mean for name, term in terms.items())
    assert float(total) == pytest.approx(float(io["seg_loss_total"]), rel=1e-4)


def test_true_iou_of_the_reference(io):
    for i in range(2):
        one = [x[i : i + 1] for x in seg(io)]
        _, metrics = losses.mask_terms(*one)
        expected = float(io["seg_true_iou"][i, 0])
        assert float(metrics["mask_overlap"].mean) == pytest.approx(expected, rel=1e-4)


def mask_value(arrays, **fields):
    terms, _ = losses.mask_terms(*arrays, **fields)
    return float(terms_lib.value({name: x.scaled(SCALES[name]) for name, x in terms.items()}))


def test_a_mask_has_the_same_loss_in_every_batch(io):
    """Unless the count is taken from the batch, as the released code does."""
    whole = seg(io)
    apart = [[x[i : i + 1] for x in whole] for i in range(2)]
    mean = np.mean([mask_value(one) for one in apart])
    assert mask_value(whole) == pytest.approx(mean, rel=1e-5)
    released = np.mean([mask_value(one, masks_per_device=0) for one in apart])
    assert mask_value(whole, masks_per_device=0) > 1.5 * released


def test_two_masks_of_one_image_and_of_two_are_the_same(io):
    """[2, 1] masks as [1, 2], and with an empty slot each."""
    whole = seg(io)
    together = [jnp.swapaxes(jnp.asarray(x), 0, 1) for x in whole]
    padded = [jnp.concatenate([jnp.asarray(x), jnp.full_like(jnp.asarray(x), fill)], axis=1)
              for x, fill in zip(whole, (np.nan, np.nan, 1, False))]  # fmt: skip
    for other in (together, padded):
        assert mask_value(other) == pytest.approx(mask_value(whole), rel=1e-6)


def test_an_unknown_mean():
    with pytest.raises(ValueError, match="giou_mean 'all' is none of"):
        box_losses(np.zeros((1, 4)), np.zeros((1, 4)), giou_mean="all")
