"""Answers with locations, in one pass over the hidden states.

    ... The dog <at> [box] runs after <at> [box] .
                 │     ▲
                 └─ state ── box_decoder ── box ── box_encoder ── what is read next

Where the model said `<at>`, the state behind it is a location; whatever token is drawn there, the
network reads the vector of the box that was decoded, and the token is written down as `<boxes>`
(arXiv 2311.04498, sec. 3.3). Masks are made afterwards, of all locations at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.decoding import feeds, generate, sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """What was generated for every row.

    Attributes:
      tokens_bt: int32; behind the end 0.
      lengths_b: int32, the end token counted.
      states_bkd: float32, of the locations in their order. boxes_bkx: float32[B, K, 4].
      valid_bk: bool, locations that there are. lost_b: int32, those beyond K.
    """

    tokens_bt: jax.Array
    lengths_b: jax.Array
    states_bkd: jax.Array
    boxes_bkx: jax.Array
    valid_bk: jax.Array
    lost_b: jax.Array


def answer(
    module: Any,
    x_btd: jax.Array,
    valid_bt: jax.Array,
    rng: jax.Array,
    *,
    num_new: int,
    eos_id: int,
    num_slots: int,
    sampler: Any = sampling.GREEDY,
) -> Answers:
    """Continues conversations. Traceable.

    Args:
      module: `network.NextChat`.
      x_btd: what the decoder reads, of `module.inputs`; shorter ones are padded on the left.
      valid_bt: bool, vectors that are read.
      rng: key; greedy sampling ignores it.
      num_new: tokens of an answer, at most; static.
      eos_id: ends an answer.
      num_slots: locations of an answer, at most; static.
      sampler: see `sampling.Sampler`.
    """
    at_id, boxes_id = module.cfg.at_id, module.cfg.boxes_id
    rows, _, width = x_btd.shape
    embed = feeds.tokens(module.decoder.embed)

    def feed(drawn, carry):
        located_r = carry["last"] == at_id  # the state is that of a location
        state_rd = drawn.hidden.astype(jnp.float32)
        box_rx = module.box_decoder(state_rd[:, None])
        vector_rd = module.box_encoder(box_rx)[:, 0]
        plain_rd, _ = embed(drawn, None)
        x_rd = jnp.where(located_r[:, None], vector_rd.astype(plain_rd.dtype), plain_rd)
        kept_r = located_r & drawn.live
        slot_r = jnp.where(kept_r, carry["count"], num_slots)  # beyond the end: dropped
        row_r = jnp.arange(rows)
        return x_rd, {
            "last": jnp.where(located_r, boxes_id, drawn.token),
            "count": carry["count"] + kept_r,
            "states": carry["states"].at[row_r, slot_r].set(state_rd, mode="drop"),
            "boxes": carry["boxes"].at[row_r, slot_r].set(box_rx[:, 0], mode="drop"),
        }

    made = generate.generate(
        module.decoder,
        x_btd,
        num_new,
        rng,
        feed=feed,
        carry={
            "last": jnp.full(rows, -1, jnp.int32),
            "count": jnp.zeros(rows, jnp.int32),
            "states": jnp.zeros((rows, num_slots, width), jnp.float32),
            "boxes": jnp.zeros((rows, num_slots, 4), jnp.float32),
        },
        sampler=sampler,
        valid_bt=valid_bt,
        stop_ids=(eos_id,),
    )
    tokens_bt = made.tokens_bst[:, 0]
    # What was drawn behind `<at>` says nothing.
    behind_bt = jnp.pad(tokens_bt[:, :-1] == at_id, ((0, 0), (1, 0)))
    inside_bt = jnp.arange(num_new) < made.lengths_bs
    tokens_bt = jnp.where(behind_bt & inside_bt, boxes_id, tokens_bt)
    count_b = made.carry["count"]
    return Answers(
        tokens_bt,
        made.lengths_bs[:, 0],
        made.carry["states"],
        made.carry["boxes"],
        jnp.arange(num_slots) < count_b[:, None],
        jnp.maximum(count_b - num_slots, 0),
    )
