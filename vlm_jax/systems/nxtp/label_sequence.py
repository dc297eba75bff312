"""Labels one after another in a single sequence: the baselines of one-shot sampling.

Yue et al., arXiv 2312.02142, sec. 3.3 and table 5: greedy, top-k and top-p (the sampler says
which). Two programs for two masks:

    decode             causal behind the image; keys are cached; several samples share one prefill
    decode_isolating   the published program's: a label is hidden once the next one is complete
                       (`masks.sequential_labels`). Earlier rows change with every delimiter, so
                       all of the sequence is computed again for every token.

The network offers what `decoding.one_shot` needs, and for the second program
`transform(x_btd, mask_bts=) -> (hidden_btd, None)`, `logits` and `embed`. Cut the result into
labels with `label_lists.sequence_groups`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.decoding import sampling
from vlm_jax.ops import masks

PENALTY = 1.2  # upstream: configs/config_base.py


def decode(
    network: Any,
    prefix_btd: jax.Array,
    rng: jax.Array,
    *,
    num_new: int,
    sampler: sampling.Sampler = sampling.GREEDY,
    penalty: float = PENALTY,
    num_samples: int = 1,
    prefix_block: int = 0,
    valid_bt: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cached, causal. Traceable; `compile` wraps it in a jit.

    Args:
      network, prefix_btd, prefix_block, valid_bt: as in `one_shot.decode`.
      rng: key; greedy sampling ignores it.
      num_new: tokens; nothing ends earlier.
      sampler: static.
      penalty: divides the logits of ids that were generated before, once each and also when they
        are negative, as published; 0 or 1 is none.
      num_samples: sequences per image.

    Returns:
      (int32 ids_brt, float32 probs_brt), r samples per image; the probabilities are those that were
      sampled from, after penalty, temperature and filters.

    Raises:
      ValueError: num_new or num_samples below 1.
    """
    _check(num_new, num_samples)
    logits_bv, cache = network.prefill(prefix_btd, valid_bt=valid_bt, prefix_block=prefix_block)
    b, v = logits_bv.shape
    rows = b * num_samples
    pick = functools.partial(_pick, rng, sampler, penalty)
    state = jnp.repeat(logits_bv, num_samples, axis=0), jnp.zeros((rows, v), bool)
    token_r, prob_r, seen_rv = pick(0, *state)

    def extend(state, i):
        token_r, seen_rv, branches = state
        tokens_br = token_r.reshape(b, num_samples)
        logits_brv, branches = network.extend(tokens_br, branches)
        token_r, prob_r, seen_rv = pick(i, logits_brv.reshape(rows, v), seen_rv)
        return (token_r, seen_rv, branches), (token_r, prob_r)

    branches = network.fork(cache, num_samples, num_new - 1)
    steps = jnp.arange(1, num_new)
    _, (ids_tr, probs_tr) = jax.lax.scan(extend, (token_r, seen_rv, branches), steps)
    return tuple(
        jnp.concatenate([first_r[None], more_tr]).T.reshape(b, num_samples, num_new)
        for first_r, more_tr in ((token_r, ids_tr), (prob_r, probs_tr))
    )


def decode_isolating(
    network: Any,
    prefix_btd: jax.Array,
    rng: jax.Array,
    *,
    num_new: int,
    delimiter_id: int,
    sampler: sampling.Sampler = sampling.GREEDY,
    penalty: float = PENALTY,
    num_samples: int = 1,
    prefix_block: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """As `decode`, with the published program's mask and without a cache.

    Args:
      delimiter_id: ends a label.
    """
    _check(num_new, num_samples)
    prefix_rtd = jnp.repeat(prefix_btd, num_samples, axis=0)
    rows, p, _ = prefix_rtd.shape
    v = jax.eval_shape(network.logits, prefix_rtd[:, -1:]).shape[-1]
    tokens_t = jnp.arange(num_new)

    def extend(state, i):
        ids_rt, seen_rv = state
        # Tokens from i on are not there yet; the causal order hides them.
        end_rt = (ids_rt == delimiter_id) & (tokens_t < i)
        label_rt = jnp.cumsum(end_rt, axis=1) - end_rt + 2
        segments_rs = jnp.pad(label_rt, ((0, 0), (p, 0)), constant_values=1)
        mask_rts = masks.sequential_labels(segments_rs, end_rt.sum(axis=1), prefix_block)
        x_rsd = jnp.concatenate([prefix_rtd, network.embed(ids_rt)], axis=1)
        hidden_rsd, _ = network.transform(x_rsd, mask_bts=mask_rts)
        last_r1d = jax.lax.dynamic_slice_in_dim(hidden_rsd, p - 1 + i, 1, axis=1)
        logits_rv = network.logits(last_r1d)[:, 0]
        token_r, prob_r, seen_rv = _pick(rng, sampler, penalty, i, logits_rv, seen_rv)
        return (ids_rt.at[:, i].set(token_r), seen_rv), prob_r

    state = jnp.zeros((rows, num_new), jnp.int32), jnp.zeros((rows, v), bool)
    (ids_rt, _), probs_tr = jax.lax.scan(extend, state, tokens_t)
    shape = len(prefix_btd), num_samples, num_new
    return ids_rt.reshape(shape), probs_tr.T.reshape(shape)


def _check(num_new, num_samples):
    if num_new < 1 or num_samples < 1:
        raise ValueError(f"num_new {num_new} and num_samples {num_samples} must be at least 1")


def _pick(rng, sampler, penalty, i, logits_rv, seen_rv):
    """(token_r, its probability, seen_rv with it)."""
    logits_rv = sampling.penalized(logits_rv.astype(jnp.float32), seen_rv, penalty)
    token_r = sampler(jax.random.fold_in(rng, i), logits_rv)
    logp_rv = jax.nn.log_softmax(sampler.warp(logits_rv), axis=-1)
    row_r = jnp.arange(len(token_r))
    return token_r, jnp.exp(logp_rv[row_r, token_r]), seen_rv.at[row_r, token_r].set(True)


def compile(
    bind: Callable[[Any], Any], **options: Any
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """One jitted function of (params, prefix_btd, rng, valid_bt=None).

    Args:
      bind: params -> network.
      **options: of `decode_isolating` where there is a delimiter_id, else of `decode`.
    """

    @jax.jit
    def run(params, prefix_btd, rng, valid_bt=None):
        if "delimiter_id" in options:
            if valid_bt is not None:
                raise ValueError(
                    "decode_isolating takes prefixes of one length; leave out valid_bt"
                )
            return decode_isolating(bind(params), prefix_btd, rng, **options)
        return decode(bind(params), prefix_btd, rng, valid_bt=valid_bt, **options)

    return run
