"""Beam search over the step of `generate`.

A step keeps the w best continuations of w beams:

    beams  ─ w + 1 best tokens each ─ sort ─┬─ end token ─ finished, at most w * patience
                                            └─ the first w others ─ beams

The third baseline of one-shot sampling (arXiv 2312.02142, table 5); what the released program of
that paper does differently is in `systems/nxtp/reference_beam.py`. The cache is that of the prefix,
forked: keys of a prefix, or of an encoder, are there once per image, and `select` moves only what
belongs to a beam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.decoding import feeds, processors

PAD_ID = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """The sequences of every image, the best first.

    Attributes:
      ids_bwt: int32, the end token included, then PAD_ID.
      scores_bw: float32, sum of log probabilities over the length.
      carry: of the feed, leaves [B, W, ...]: behind the last token but an end token.
    """

    ids_bwt: jax.Array
    scores_bw: jax.Array
    carry: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Finished:
    """Sequences that have ended, f places per image.

    Attributes:
      ids_bft: int32. totals_bf: float32, sums of log probabilities. lengths_bf: int32.
      carry: leaves [B, F, ...].
      count_b: int32, places in use.
    """

    ids_bft: jax.Array
    totals_bf: jax.Array
    lengths_bf: jax.Array
    carry: Any
    count_b: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Of the search, between two tokens.

    Attributes:
      index: int32, tokens per beam so far.
      x_bwd: what the network reads next.
      totals_bw: float32, sums of log probabilities.
      ids_bwt: int32, so far, then PAD_ID.
      finished: see there.
      cache, carry, memory: of the network, the feed, the processors; they have followed the beams.
    """

    index: jax.Array
    x_bwd: jax.Array
    totals_bw: jax.Array
    ids_bwt: jax.Array
    finished: Finished
    cache: Any
    carry: Any
    memory: tuple[Any, ...]


def decode(
    network: Any,
    prefix_btd: jax.Array,
    *,
    num_new: int,
    beam_size: int = 3,
    end_id: int | None = None,
    patience: float = 1.0,
    cache: Any = None,
    feed: feeds.Feed | None = None,
    carry: Any = None,
    logits_processors: Sequence[processors.Processor] = (),
    prefix_block: int = 0,
    valid_bt: jax.Array | None = None,
    extra_length: int = 0,
    follow: bool = True,
) -> Beams:
    """Traceable; everything but arrays is static. `compile` wraps it in a jit.

    Args:
      network, prefix_btd, prefix_block, valid_bt: as in `generate.generate`.
      num_new: most tokens of a sequence.
      beam_size: beams per image.
      end_id: ends a sequence; None ends all after num_new tokens.
      patience: an image is done when beam_size * patience of its sequences have ended.
      cache: empty, of B rows and as many slots as the prefix has vectors; None makes one.
      feed, carry: as in `generate.generate`; leaves of the carry are [B, W, ...].
      logits_processors: of beams, [B, W, V].
      extra_length: added to the length that scores are divided by.
      follow: False leaves the cache in place when beams move, which is wrong; see the reference.

    Returns:
      Beams.

    Raises:
      ValueError: num_new or beam_size below 1, or beams that the vocabulary does not fill.
    """
    if num_new < 1 or beam_size < 1:
        raise ValueError(f"num_new {num_new} and beam_size {beam_size} must be at least 1")
    feed = feed or feeds.tokens(network.embed)
    if cache is None:
        cache = network.make_cache(*prefix_btd.shape[:2])
    context: dict[str, Any] = {} if valid_bt is None else dict(valid_bt=valid_bt)
    if prefix_block:
        context["prefix_block"] = prefix_block
    logits_bv, hidden_bd, cache = network.step(prefix_btd, cache, **context)
    b, v = logits_bv.shape
    if beam_size >= v:
        raise ValueError(f"beam_size {beam_size} must be below the vocabulary of {v} tokens")
    places = max(1, round(beam_size * patience))  # for finished sequences

    def grow(state, logits_bwv, hidden_bwd):
        """The state with one more token per beam."""
        logits_bwv = processors.apply(logits_processors, logits_bwv, state.memory)
        options = _Options.best(logits_bwv, state.totals_bw, end_id)
        finished = _finish(state, options, beam_size)
        kept = options.others(beam_size)
        ids_bwt = jnp.take_along_axis(state.ids_bwt, kept.source_bc[..., None], axis=1)
        ids_bwt = ids_bwt.at[:, :, state.index].set(kept.token_bc)
        drawn = feeds.Drawn(
            state.index,
            kept.token_bc,
            _take(hidden_bwd, kept.source_bc),
            jnp.ones(kept.token_bc.shape, bool),
        )
        carry = jax.tree.map(lambda x: _take(x, kept.source_bc), state.carry)
        x_bwd, carry = feed(drawn, carry)
        memory = processors.update(logits_processors, state.memory, kept.token_bc, kept.source_bc)
        cache = state.cache
        if follow and cache is not None:
            cache = cache.select(kept.source_bc)
        return State(state.index + 1, x_bwd, kept.total_bc, ids_bwt, finished, cache, carry, memory)

    def unfinished(state):
        return (state.index < num_new) & (state.finished.count_b < places).any()

    def extend(state):
        logits_bwv, hidden_bwd, cache = network.step(state.x_bwd, state.cache)
        return grow(dataclasses.replace(state, cache=cache), logits_bwv, hidden_bwd)

    state = State(
        jnp.int32(0),
        hidden_bd,
        # All beams start alike, so only the first one counts.
        jnp.where(jnp.arange(beam_size) == 0, 0.0, -jnp.inf) * jnp.ones((b, 1)),
        jnp.full((b, beam_size, num_new), PAD_ID, jnp.int32),
        Finished(
            jnp.full((b, places, num_new), PAD_ID, jnp.int32),
            jnp.full((b, places), -jnp.inf),
            jnp.ones((b, places), jnp.int32),
            jax.tree.map(lambda x: jnp.zeros((b, places, *x.shape[2:]), x.dtype), carry),
            jnp.zeros(b, jnp.int32),
        ),
        None,
        carry,
        processors.start(logits_processors, (b, beam_size), v),
    )
    start = [
        jnp.broadcast_to(x[:, None], (b, beam_size, x.shape[-1])) for x in (logits_bv, hidden_bd)
    ]
    state = dataclasses.replace(grow(state, *start), cache=cache.fork(beam_size, num_new - 1))
    state = jax.lax.while_loop(unfinished, extend, state)
    return _ranked(state, beam_size, extra_length)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Candidates of every image, the best first: c is beams times tokens each."""

    total_bc: jax.Array
    token_bc: jax.Array
    source_bc: jax.Array
    is_end_bc: jax.Array

    @staticmethod
    def best(logits_bwv, totals_bw, end_id):
        """beam_size + 1 tokens of each beam: enough, even if one of each is the end."""
        b, beam_size, _ = logits_bwv.shape
        logp_bwc, token_bwc = jax.lax.top_k(jax.nn.log_softmax(logits_bwv), beam_size + 1)
        source_bwc = jnp.broadcast_to(jnp.arange(beam_size)[:, None], token_bwc.shape)
        found = totals_bw[..., None] + logp_bwc, token_bwc, source_bwc
        columns = [x.reshape(b, -1) for x in found]
        order_bc = jnp.argsort(-columns[0], axis=1, stable=True)
        total_bc, token_bc, source_bc = (jnp.take_along_axis(x, order_bc, axis=1) for x in columns)
        is_end_bc = jnp.zeros_like(token_bc, bool) if end_id is None else token_bc == end_id
        return _Options(total_bc, token_bc, source_bc, is_end_bc)

    def others(self, count):
        """The first so many that do not end."""
        kept_bw = jnp.argsort(self.is_end_bc, axis=1, stable=True)[:, :count]
        return _Options(*(jnp.take_along_axis(x, kept_bw, axis=1) for x in vars(self).values()))


def _finish(state, options, beam_size):
    """Ended sequences count as long as they are better than the last beam that is kept."""
    finished = state.finished
    places = finished.totals_bf.shape[1]
    ended_bc = options.is_end_bc & (jnp.cumsum(~options.is_end_bc, axis=1) < beam_size)
    place_bc = finished.count_b[:, None] + jnp.cumsum(ended_bc, axis=1) - 1
    place_bc = jnp.where(ended_bc, place_bc, places)  # beyond the end: dropped
    image_b1 = jnp.arange(len(place_bc))[:, None]

    def put(x, value):
        return x.at[image_b1, place_bc].set(value, mode="drop")

    ids_bct = jnp.take_along_axis(state.ids_bwt, options.source_bc[..., None], axis=1)
    ids_bct = ids_bct.at[:, :, state.index].set(options.token_bc)
    carry = jax.tree.map(
        lambda x, beams: put(x, _take(beams, options.source_bc)), finished.carry, state.carry
    )
    return Finished(
        put(finished.ids_bft, ids_bct),
        put(finished.totals_bf, options.total_bc),
        put(finished.lengths_bf, state.index + 1),
        carry,
        jnp.minimum(finished.count_b + ended_bc.sum(axis=1), places),
    )


def _ranked(state, beam_size, extra_length):
    """The beams that are left fill up the places behind the ended sequences."""
    finished = state.finished
    fills_bw = jnp.arange(beam_size) < beam_size - finished.count_b[:, None]
    totals_bw = jnp.where(fills_bw, state.totals_bw, -jnp.inf)
    lengths_bw = jnp.broadcast_to(state.index, totals_bw.shape)
    lengths_bf = jnp.concatenate([finished.lengths_bf, lengths_bw], axis=1)
    scores_bf = jnp.concatenate([finished.totals_bf, totals_bw], axis=1)
    scores_bw, best_bw = jax.lax.top_k(scores_bf / (lengths_bf + extra_length), beam_size)

    def pick(ended, left):
        return _take(jnp.concatenate([ended, left], axis=1), best_bw)

    carry = jax.tree.map(pick, finished.carry, state.carry)
    return Beams(pick(finished.ids_bft, state.ids_bwt), scores_bw, carry)


def _take(x, index_bw):
    """Beams of [B, W, ...] by their numbers."""
    return jnp.take_along_axis(x, index_bw.reshape(*index_bw.shape, *[1] * (x.ndim - 2)), axis=1)


def compile(bind: Callable[[Any], Any], **options: Any) -> Callable[..., Beams]:
    """`decode` as one jitted function of (params, prefix_btd, valid_bt=None).

    Args:
      bind: params -> network.
      **options: of `decode`.
    """

    @jax.jit
    def run(params, prefix_btd, valid_bt=None):
        return decode(bind(params), prefix_btd, valid_bt=valid_bt, **options)

    return run
