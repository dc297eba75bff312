"""The losses of boxes, cycles and masks, as terms: sums, and the counts that they are divided by.

    box_l1        2    |F(t) - b|                       answer's locations
    box_giou      0.2  1 - GIoU(F(t), b)                answer's locations
    cycle_state   1    (G(F(t)) - t)^2                  answer's locations
    cycle_box     1    |F(G(b)) - b|                    all boxes, those of questions too
    mask_focal    20   n (1 - e^-bce)^2 bce             masks; bce is the mean over the image
    mask_dice     1    1 - (2 sum(pg) + n) / (sum(p) + sum(g) + n)
    mask_iou      1    (estimate - IoU)^2 / n           IoU of logits above 0.5

t is the hidden state at `<at>`, b the true box, F `box_decoder`, G `box_encoder`; p and g are
predicted and true mask. Zhang et al., arXiv 2311.04498; weights and n are those of the released
code. The paper gives GIoU 0.8; focal and dice usually have constants where n stands (0.8, 1).
n is the number of masks on one of upstream's devices, see `mask_terms`.

In the released code a made-up example at the end of every batch keeps the modules in the graph,
with its losses weighted 1e-10. Here terms without anything to count are 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.ops import boxes, losses

GIOU_MEANS = ("boxes", "ordered")


def box_terms(
    boxes_bkx: jax.Array, true_bkx: jax.Array, valid_bk: jax.Array, *, giou_mean: str = "boxes"
) -> tuple[dict[str, losses.Term], dict[str, losses.Term]]:
    """{"box_l1", "box_giou"}, unscaled, and {"box_iou"} to look at.

    Boxes predicted with reversed corners have no GIoU: only L1 moves them.

    Args:
      boxes_bkx, true_bkx: float32[B, K, 4], (x0, y0, x1, y1).
      valid_bk: bool, locations that count.
      giou_mean: over all of those boxes ("boxes"), or as the released code does over those that
        are predicted with ordered corners ("ordered"). That count depends on the parameters, so
        accumulated parts cost a second forward pass.

    Returns:
      (terms, metrics).

    Raises:
      ValueError: another giou_mean.
    """
    if giou_mean not in GIOU_MEANS:
        raise ValueError(f"giou_mean {giou_mean!r} is none of {GIOU_MEANS}")
    count = _count(valid_bk)
    ordered_bk = valid_bk & boxes.is_ordered(boxes_bkx)
    # Boxes without a GIoU are left out before it is computed: 0 times their NaN is NaN.
    kept_bkx = jnp.where(ordered_bk[..., None], boxes_bkx, true_bkx)
    there_bkx = jnp.where(valid_bk[..., None], true_bkx, 0.0)
    iou_bk, giou_bk = boxes.iou(kept_bkx, there_bkx), boxes.giou(kept_bkx, there_bkx)
    giou_count = count if giou_mean == "boxes" else jax.lax.stop_gradient(_count(ordered_bk))
    terms = {
        "box_l1": losses.Term(_sum(jnp.abs(boxes_bkx - true_bkx).mean(-1), valid_bk), count),
        "box_giou": losses.Term(_sum(1 - giou_bk, ordered_bk), giou_count),
    }
    return terms, {"box_iou": losses.Term(jax.lax.stop_gradient(_sum(iou_bk, ordered_bk)), count)}


def cycle_terms(
    states_bkd: jax.Array,
    states_again_bkd: jax.Array,
    answer_bk: jax.Array,
    true_bkx: jax.Array,
    boxes_again_bkx: jax.Array,
    valid_bk: jax.Array,
) -> dict[str, losses.Term]:
    """{"cycle_state", "cycle_box"}: what comes back through both modules. Nothing is held fixed.

    Args:
      states_bkd: float32, hidden states at `<at>`.
      states_again_bkd: G(F(states)).
      answer_bk: bool, locations of the answer.
      true_bkx: boxes of all locations.
      boxes_again_bkx: F(G(boxes)).
      valid_bk: bool, locations with a box.
    """
    squares_bk = jnp.square(states_again_bkd - states_bkd).mean(-1)
    errors_bk = jnp.abs(boxes_again_bkx - true_bkx).mean(-1)
    return {
        "cycle_state": losses.Term(_sum(squares_bk, answer_bk), _count(answer_bk)),
        "cycle_box": losses.Term(_sum(errors_bk, valid_bk), _count(valid_bk)),
    }


def mask_terms(
    logits_bmyx: jax.Array,
    iou_bm: jax.Array,
    true_bmyx: jax.Array,
    valid_bm: jax.Array,
    *,
    masks_per_device: int = 8,
) -> tuple[dict[str, losses.Term], dict[str, losses.Term]]:
    """{"mask_focal", "mask_dice", "mask_iou"}, unscaled, and {"mask_overlap"} to look at.

    The released code adds up over the masks of a batch and hands their number on as focal's alpha
    and dice's smoothing, so that a loss depends on what else is in the batch. Here that number is a
    constant; with it, a batch of as many masks has upstream's loss.

    Args:
      logits_bmyx: float32 at the masks' size.
      iou_bm: float32, the decoder's estimate.
      true_bmyx: masks of 0 and 1, any dtype.
      valid_bm: bool, masks that count.
      masks_per_device: n; upstream trained with 8. 0 takes the number in this batch, as released.
    """
    count = _count(valid_bm)
    n = jnp.float32(masks_per_device) if masks_per_device else jnp.maximum(count, 1.0)
    logits = jnp.where(valid_bm[..., None, None], logits_bmyx.astype(jnp.float32), 0.0)
    true = true_bmyx.astype(jnp.float32)
    bce_bm = (jax.nn.softplus(logits) - logits * true).mean((-2, -1))
    focal_bm = jnp.square(1 - jnp.exp(-bce_bm)) * bce_bm
    inside, size_bm = jax.nn.sigmoid(logits), true.sum((-2, -1))
    overlap_bm = (inside * true).sum((-2, -1))
    dice_bm = 1 - (2 * overlap_bm + n) / (inside.sum((-2, -1)) + size_bm + n)
    # The threshold is on logits, as released: .62 of probability.
    said = (logits >= 0.5).astype(jnp.float32)
    both_bm = (said * true).sum((-2, -1))
    found_bm = both_bm / (said.sum((-2, -1)) + size_bm - both_bm + 1e-7)
    # Sums of n masks are n times a mean.
    terms = {
        "mask_focal": losses.Term(n * n * _sum(focal_bm, valid_bm), count),
        "mask_dice": losses.Term(n * _sum(dice_bm, valid_bm), count),
        "mask_iou": losses.Term(_sum(jnp.square(iou_bm - found_bm), valid_bm), count),
    }
    return terms, {"mask_overlap": losses.Term(_sum(found_bm, valid_bm), count)}


def _sum(x_bk, valid_bk):
    return jnp.sum(jnp.where(valid_bk, x_bk, 0.0))


def _count(valid_bk):
    return valid_bk.sum(dtype=jnp.float32)
