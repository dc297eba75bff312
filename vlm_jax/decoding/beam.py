"""Beam search, the third baseline of one-shot sampling (arXiv 2312.02142, table 5).

A step keeps the w best continuations of w beams:

    beams  ─ w + 1 best tokens each ─ sort ─┬─ end token ─ finished, at most w * patience
                                            └─ the first w others ─ beams

`reference=True` repeats the released program: a surviving beam's tokens move to their new place,
but the vectors that the network reads do not follow them, so that a beam that moved is continued
from another one's past; the penalty hits the ids of the prompt and of every sequence that was ever
at the beam's place; and scores are divided by the length with the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.decoding import sampling

PAD_ID = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """The sequences of every image, the best first.

    Attributes:
      ids_bwt: int32, the end token included, then PAD_ID.
      scores_bw: float32, sum of log probabilities over the length.
    """

    ids_bwt: jax.Array
    scores_bw: jax.Array


def decode(
    network: Any,
    prefix_btd: jax.Array,
    *,
    num_new: int,
    width: int = 3,
    end_id: int | None = None,
    patience: float = 1.0,
    penalty: float = 0.0,
    prompt_bt: jax.Array | None = None,
    prefix_block: int = 0,
    valid_bt: jax.Array | None = None,
    reference: bool = False,
) -> Beams:
    """Traceable; everything but arrays is static. `compile` wraps it in a jit.

    Args:
      network, prefix_btd, prefix_block, valid_bt: as in `one_shot.decode`.
      num_new: most tokens of a sequence.
      width: beams.
      end_id: ends a sequence; None ends all after num_new tokens.
      patience: an image is done when width * patience of its sequences have ended.
      penalty: as in `sampling.penalized`.
      prompt_bt: ids of the prompt, for `reference`.
      reference: see the top of this file.

    Returns:
      Beams.

    Raises:
      ValueError: num_new or width below 1, or a width that the vocabulary does not fill.
    """
    if num_new < 1 or width < 1:
        raise ValueError(f"num_new {num_new} and width {width} must be at least 1")
    logits_bv, cache = network.prefill(prefix_btd, valid_bt=valid_bt, prefix_block=prefix_block)
    b, v = logits_bv.shape
    if width >= v:
        raise ValueError(f"width {width} must be below the vocabulary of {v} tokens")
    places = max(1, round(width * patience))  # for finished sequences
    image_b1 = jnp.arange(b)[:, None]
    seen_bwv = jnp.zeros((b, width, v), bool)
    if reference and prompt_bt is not None:
        seen_bwv = seen_bwv.at[image_b1, :, prompt_bt].set(True)

    def grow(i, logits_bwv, sums_bw, ids_bwt, seen_bwv, finished):
        logits_bwv = sampling.penalized(logits_bwv.astype(jnp.float32), seen_bwv, penalty)
        logp_bwc, token_bwc = jax.lax.top_k(jax.nn.log_softmax(logits_bwv), width + 1)
        flat = lambda x: x.reshape(b, -1)  # noqa: E731
        total_bc = flat(sums_bw[..., None] + logp_bwc)
        source_bc = flat(jnp.broadcast_to(jnp.arange(width)[:, None], token_bwc.shape))
        order_bc = jnp.argsort(-total_bc, axis=1, stable=True)
        total_bc, token_bc, source_bc = (
            jnp.take_along_axis(x, order_bc, axis=1) for x in (total_bc, flat(token_bwc), source_bc)
        )
        is_end_bc = jnp.zeros_like(token_bc, bool) if end_id is None else token_bc == end_id
        others_bc = jnp.cumsum(~is_end_bc, axis=1)
        # Ended sequences count as long as they are better than the last beam that is kept.
        finished = _finish(
            i, finished, is_end_bc & (others_bc < width), total_bc, ids_bwt, source_bc
        )
        kept_bw = jnp.argsort(is_end_bc, axis=1, stable=True)[:, :width]
        sums_bw, token_bw, source_bw = (
            jnp.take_along_axis(x, kept_bw, axis=1) for x in (total_bc, token_bc, source_bc)
        )
        ids_bwt = jnp.take_along_axis(ids_bwt, source_bw[..., None], axis=1)
        ids_bwt = ids_bwt.at[:, :, i].set(token_bw)
        if reference:
            there_bwt = jnp.where(ids_bwt < 0, v, ids_bwt)  # v: dropped
            place = image_b1[..., None], jnp.arange(width)[:, None], there_bwt
            seen_bwv = seen_bwv.at[place].set(True, mode="drop")
        else:
            seen_bwv = jnp.take_along_axis(seen_bwv, source_bw[..., None], axis=1)
            seen_bwv = seen_bwv.at[image_b1, jnp.arange(width), token_bw].set(True)
        return source_bw, sums_bw, ids_bwt, seen_bwv, finished

    def _finish(i, finished, ended_bc, total_bc, ids_bwt, source_bc):
        if end_id is None:
            return finished
        ids_bft, totals_bf, lengths_bf, count_b = finished
        place_bc = count_b[:, None] + jnp.cumsum(ended_bc, axis=1) - 1
        place_bc = jnp.where(ended_bc, place_bc, places)  # beyond the end: dropped
        sequence_bct = jnp.take_along_axis(ids_bwt, source_bc[..., None], axis=1)
        put = lambda x, value: x.at[image_b1, place_bc].set(value, mode="drop")  # noqa: E731
        count_b = jnp.minimum(count_b + ended_bc.sum(axis=1), places)
        ids_bft = put(ids_bft, sequence_bct.at[:, :, i].set(end_id))
        return ids_bft, put(totals_bf, total_bc), put(lengths_bf, i + 1), count_b

    def unfinished(state):
        i, _, _, _, finished, _, _ = state
        return (i < num_new) & (finished[3] < places).any()

    def extend(state):
        i, sums_bw, ids_bwt, seen_bwv, finished, branches, source_bw = state
        if not reference:
            branches = branches.select(source_bw)
        token_bw = jax.lax.dynamic_index_in_dim(ids_bwt, i - 1, axis=2, keepdims=False)
        logits_bwv, branches = network.extend(token_bw, branches)
        grown = grow(i, logits_bwv, sums_bw, ids_bwt, seen_bwv, finished)
        source_bw, *rest = grown
        return (i + 1, *rest, branches, source_bw)

    empty = jnp.full((b, width, num_new), PAD_ID, jnp.int32)
    finished = (
        jnp.full((b, places, num_new), PAD_ID, jnp.int32),
        jnp.full((b, places), -jnp.inf),
        jnp.ones((b, places), jnp.int32),
        jnp.zeros(b, jnp.int32),
    )
    # All beams start alike, so only the first one counts.
    sums_bw = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf) * jnp.ones((b, 1))
    logits_bwv = jnp.broadcast_to(logits_bv[:, None], (b, width, v))
    source_bw, *rest = grow(0, logits_bwv, sums_bw, empty, seen_bwv, finished)
    branches = network.fork(cache, width, num_new - 1)
    state = (jnp.int32(1), *rest, branches, source_bw)
    i, sums_bw, ids_bwt, _, finished, _, _ = jax.lax.while_loop(unfinished, extend, state)

    ids_bft, totals_bf, lengths_bf, count_b = finished
    # The beams that are left fill up the w places behind the ended sequences.
    fills_bw = jnp.arange(width) < width - count_b[:, None]
    sums_bw = jnp.where(fills_bw, sums_bw, -jnp.inf)
    extra = prompt_bt.shape[1] if reference and prompt_bt is not None else 0
    lengths_bf = jnp.concatenate([lengths_bf, jnp.broadcast_to(i, sums_bw.shape)], axis=1)
    scores_bf = jnp.concatenate([totals_bf, sums_bw], axis=1) / (lengths_bf + extra)
    scores_bw, best_bw = jax.lax.top_k(scores_bf, width)
    ids_bft = jnp.concatenate([ids_bft, ids_bwt], axis=1)
    return Beams(jnp.take_along_axis(ids_bft, best_bw[..., None], axis=1), scores_bw)


def compile(bind: Callable[[Any], Any], **options: Any) -> Callable[..., Beams]:
    """`decode` as one jitted function of (params, prefix_btd, prompt_bt=None, valid_bt=None).

    Args:
      bind: params -> network.
      **options: of `decode`.
    """

    @jax.jit
    def run(params, prefix_btd, prompt_bt=None, valid_bt=None):
        arrays = dict(prompt_bt=prompt_bt, valid_bt=valid_bt)
        return decode(bind(params), prefix_btd, **arrays, **options)

    return run
