"""Labels one after another in a single sequence: the baselines of one-shot sampling.

Yue et al., arXiv 2312.02142, sec. 3.3 and table 5: greedy, top-k and top-p (the sampler says
which). Two programs for two masks:

    decode             causal behind the image; keys are cached; several samples share one prefill
    decode_isolating   the published program's: a label is hidden once the next one is complete
                       (`masks.sequential_labels`). Earlier rows change with every delimiter, so
                       all of the sequence is computed again for every token.

The network offers what `decoding.generate` needs, and for the second program
`transform(x_btd, mask_bts=) -> (hidden_btd, None)`, `logits` and `embed`. Cut the result into
labels with `label_lists.sequence_groups`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.decoding import generate, processors, sampling
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
    made = generate.generate(
        network,
        prefix_btd,
        num_new,
        rng,
        sampler=sampler,
        logits_processors=(processors.Penalty(penalty),),
        num_samples=num_samples,
        share_prompt=True,
        prefix_block=prefix_block,
        valid_bt=valid_bt,
        logp=True,
    )
    return made.tokens_bst, jnp.exp(made.logp_bst)


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
    if num_new < 1 or num_samples < 1:
        raise ValueError(f"num_new {num_new} and num_samples {num_samples} must be at least 1")
    prefix_rtd = jnp.repeat(prefix_btd, num_samples, axis=0)
    rows, p, _ = prefix_rtd.shape
    v = jax.eval_shape(network.logits, prefix_rtd[:, -1:]).shape[-1]
    tokens_t = jnp.arange(num_new)

    fewer = processors.Penalty(penalty)

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
        logits_rv = fewer(logits_rv.astype(jnp.float32), seen_rv)
        token_r = sampler(jax.random.fold_in(rng, i), logits_rv)
        prob_rv = jax.nn.softmax(sampler.warp(logits_rv), axis=-1)
        prob_r = jnp.take_along_axis(prob_rv, token_r[:, None], axis=1)[:, 0]
        seen_rv = fewer.update(seen_rv, token_r, None)
        return (ids_rt.at[:, i].set(token_r), seen_rv), prob_r

    state = jnp.zeros((rows, num_new), jnp.int32), fewer.init((rows,), v)
    (ids_rt, _), probs_tr = jax.lax.scan(extend, state, tokens_t)
    shape = len(prefix_btd), num_samples, num_new
    return ids_rt.reshape(shape), probs_tr.T.reshape(shape)


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
