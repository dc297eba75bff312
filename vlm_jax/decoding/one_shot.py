"""One-shot sampling: the k likeliest first tokens, then k labels completed side by side.

Yue et al., arXiv 2312.02142, sec. 3.3. The prefix (image and prompt) is computed once; every label
is a branch that reads the prefix's keys and its own, and ends at its first delimiter:

    prefix ─ prefill ─ softmax ─ top k ─┬─ so ─ fa ─ ,
                                        ├─ cat ─ ,
                                        └─ ...            greedy, all branches in one product

    found = one_shot.compile(fn.bind, k=10, max_tokens=20, delimiter_id=29892, prefix_block=256)(
        params, prefix_btd)                      # OneShot; rank it with decoding.label_lists

The network offers what `decoding.generate` needs; its cache `fork(k, slots)`, which gives a cache
of branches with a method `select(index_bw)`. `models.llama.Llama` is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PAD_ID = -1  # in ids_bkt, after the end of a label
# ours: a step of fewer rows costs no less, and compile time grows with every width.
_NARROWEST = 8
_SHRINK = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneShot:
    """k labels per image, in the order of their first tokens' probability.

    Attributes:
      ids_bkt: int32, the delimiter included, then PAD_ID.
      probs_bkt: float32, the probability of each token, then 1: products need no mask.
      lengths_bk: int32, tokens of the label, the delimiter included.
      ended_bk: bool, whether the delimiter came within the limit.
    """

    ids_bkt: jax.Array
    probs_bkt: jax.Array
    lengths_bk: jax.Array
    ended_bk: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Of a loop over w of the r branches of every image.

    Attributes:
      index: int32, tokens behind the first.
      token_bw: int32, what the network reads next.
      live_bw: bool, labels that have not ended.
      number_bw: int32, which of the r branches it is.
      branches: their cache.
      ids_brt, probs_brt: what was found, of all branches.
    """

    index: jax.Array
    token_bw: jax.Array
    live_bw: jax.Array
    number_bw: jax.Array
    branches: Any
    ids_brt: jax.Array
    probs_brt: jax.Array

    def narrowed(self, width: int) -> State:
        """With `width` branches, the live ones among them."""
        keep_bw = jnp.argsort(~self.live_bw, axis=1, stable=True)[:, :width]
        token_bw, live_bw, number_bw = (
            jnp.take_along_axis(x, keep_bw, axis=1)
            for x in (self.token_bw, self.live_bw, self.number_bw)
        )
        return dataclasses.replace(
            self,
            token_bw=token_bw,
            live_bw=live_bw,
            number_bw=number_bw,
            branches=self.branches.select(keep_bw),
        )


def decode(
    network: Any,
    prefix_btd: jax.Array,
    *,
    k: int,
    max_tokens: int,
    delimiter_id: int,
    prefix_block: int = 0,
    valid_bt: jax.Array | None = None,
    used: jax.Array | None = None,
    stop: bool = True,
    max_rows: int = 1024,
) -> OneShot:
    """Traceable; everything but arrays is static. `compile` wraps it in a jit.

    Args:
      network: see the top of this file, over the parameters of this trace.
      prefix_btd: vectors of image and prompt; what they are is the caller's business.
      k: labels per image, up to the size of the vocabulary.
      max_tokens: limit of a label, the delimiter included.
      delimiter_id: ends a label. As a first token too: such a label is empty.
      prefix_block: the first so many vectors see each other both ways (an image).
      valid_bt: bool, False behind the end of shorter prefixes; None is all valid.
      used: int32, complete only the first so many of the k labels, so that other numbers compile
        nothing; the caller drops the others. None is all.
      stop: False keeps generating behind delimiters, for comparisons with programs that do.
      max_rows: branches of all images that are decoded together. More go one group after another,
        so that the memory for their logits is bounded.

    Returns:
      OneShot.

    Raises:
      ValueError: k or max_tokens below 1, k larger than the vocabulary.
    """
    if k < 1 or max_tokens < 1:
        raise ValueError(f"k {k} and max_tokens {max_tokens} must be at least 1")
    empty = network.make_cache(*prefix_btd.shape[:2])
    logits_bv, _, cache = network.step(
        prefix_btd, empty, valid_bt=valid_bt, prefix_block=prefix_block
    )
    b, vocabulary = logits_bv.shape
    if k > vocabulary:
        raise ValueError(f"k {k} is larger than the vocabulary of {vocabulary} tokens; lower k")
    probs_bk, ids_bk = jax.lax.top_k(jax.nn.softmax(logits_bv.astype(jnp.float32), axis=-1), k)
    ends = delimiter_id if stop else None

    group = min(k, max(1, max_rows // b))
    extra = -k % group  # spare branches of the last group; over before they begin
    first_bk = jnp.pad(ids_bk.astype(jnp.int32), ((0, 0), (0, extra)))
    live_bk = jnp.broadcast_to(
        jnp.arange(k + extra) < (k if used is None else used), first_bk.shape
    )
    first_gbr, live_gbr = (x.reshape(b, -1, group).swapaxes(0, 1) for x in (first_bk, live_bk))

    def complete(xs):
        token_br, live_br = xs
        return _complete(network, cache, token_br, live_br, max_tokens, ends)

    if len(first_gbr) == 1:
        found = complete((first_gbr[0], live_gbr[0]))
        more_ids_bkt, more_probs_bkt = found
    else:
        found = jax.lax.map(complete, (first_gbr, live_gbr))
        more_ids_bkt, more_probs_bkt = (
            x.swapaxes(0, 1).reshape(b, k + extra, max_tokens - 1)[:, :k] for x in found
        )
    ids_bkt = jnp.concatenate([ids_bk[..., None], more_ids_bkt], axis=2).astype(jnp.int32)
    probs_bkt = jnp.concatenate([probs_bk[..., None], more_probs_bkt], axis=2)
    is_end_bkt = ids_bkt == delimiter_id
    ended_bk = is_end_bkt.any(axis=2)
    lengths_bk = jnp.where(ended_bk, is_end_bkt.argmax(axis=2) + 1, max_tokens)
    return OneShot(ids_bkt, probs_bkt, lengths_bk.astype(jnp.int32), ended_bk)


def _complete(network, cache, token_br, live_br, max_tokens, ends):
    """Tokens 1.. of every branch: (ids, probs), both [B, R, max_tokens - 1]."""
    b, r = token_br.shape
    more = max_tokens - 1
    ids_brt = jnp.full((b, r, more), PAD_ID, jnp.int32)
    probs_brt = jnp.ones((b, r, more), jnp.float32)
    if not more:
        return ids_brt, probs_brt
    if ends is not None:
        live_br &= token_br != ends
    image_b1 = jnp.arange(b)[:, None]

    def extend(state):
        live_bw = state.live_bw
        logits_bwv, _, branches = network.step(network.embed(state.token_bw), state.branches)
        token_bw, prob_bw = _likeliest(logits_bwv)
        slot = image_b1, state.number_bw, state.index
        ids_brt = state.ids_brt.at[slot].set(jnp.where(live_bw, token_bw, PAD_ID))
        probs_brt = state.probs_brt.at[slot].set(jnp.where(live_bw, prob_bw, 1.0))
        if ends is not None:
            live_bw &= token_bw != ends
        return State(
            state.index + 1, token_bw, live_bw, state.number_bw, branches, ids_brt, probs_brt
        )

    # One loop per width: as soon as the live branches of every image fit the next one, they move
    # together, so that a few long labels do not pay for all the short ones.
    number_br = jnp.broadcast_to(jnp.arange(r), (b, r))
    branches = cache.fork(r, more)
    state = State(jnp.int32(0), token_br, live_br, number_br, branches, ids_brt, probs_brt)
    for width, narrower in _widths(r, shrink=ends is not None):

        def wanted(state, narrower=narrower):
            return (state.index < more) & (state.live_bw.sum(1).max() > narrower)

        if width < state.token_bw.shape[1]:
            state = state.narrowed(width)
        state = jax.lax.while_loop(wanted, extend, state)
    return state.ids_brt, state.probs_brt


def _widths(r, shrink):
    """(width, width of the next loop), the last with 0: 100 -> (100, 25), (25, 0)."""
    widths = [r]
    while shrink and widths[-1] // _SHRINK >= _NARROWEST:
        widths.append(widths[-1] // _SHRINK)
    return list(zip(widths, [*widths[1:], 0]))


def _likeliest(logits_brv):
    """The arg max and its probability, in float32, without an array of probabilities."""
    logits_brv = logits_brv.astype(jnp.float32)
    best_br1 = logits_brv.max(axis=-1, keepdims=True)
    mass_br = jnp.exp(logits_brv - best_br1).sum(axis=-1)
    # argmax in two passes, which XLA's CPU backend vectorises: eight times as fast.
    ids_v = jnp.arange(logits_brv.shape[-1], dtype=jnp.int32)
    first_br = jnp.where(logits_brv == best_br1, ids_v, ids_v[-1]).min(axis=-1)
    return first_br, 1.0 / mass_br


def compile(bind: Callable[[Any], Any], **options: Any) -> Callable[..., OneShot]:
    """`decode` as one jitted function of (params, prefix_btd, valid_bt=None).

    Args:
      bind: params -> network.
      **options: of `decode`.
    """

    @jax.jit
    def run(params, prefix_btd, valid_bt=None):
        return decode(bind(params), prefix_btd, valid_bt=valid_bt, **options)

    return run
