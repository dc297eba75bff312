"""Generation: one prefill, then one `while_loop` that holds every further token.

    prompt ─ step ─┬─ repeat for n samples ─ sample ─ step ─ sample ─ ... ─ sample ─ tokens
    (fresh cache)  └─ cache ────────────────────────── cache ──────────────┘

Works on any `step(tokens_bt, cache, valid_bt=, fresh=) -> (logits_bv, cache)`, and on any cache
with a method `rows(index_r)` that selects rows; see `models.llama`. Prompts and answers of other
lengths compile nothing when they are filled up to a common shape, see `Lengths`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.decoding import sampling


class Lengths(NamedTuple):
    """How much of a shape is used, int32 scalars that a compiled program takes as arguments.

    Attributes:
      prompt: of the first tokens of every prompt; what stands behind is not read.
      new: tokens to generate, up to num_new.
    """

    prompt: jax.Array
    new: jax.Array


def generate(
    step: Callable[..., Any],
    cache: Any,
    prompt_bt: jax.Array,
    num_new: int,
    rng: jax.Array,
    *,
    sampler: Callable[[jax.Array, jax.Array], jax.Array] = sampling.GREEDY,
    valid_bt: jax.Array | None = None,
    lengths: Lengths | None = None,
    num_samples: int = 1,
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
) -> jax.Array:
    """Continues every prompt `num_samples` times. Traceable; `compile` wraps it in a jit.

    Args:
      step: the network over the parameters of this trace.
      cache: empty, with B rows and T + num_new - 1 slots or more.
      prompt_bt: int32. Shorter prompts are padded on the left, and valid_bt says where.
      num_new: tokens to generate, at least 1; static.
      rng: key; equal keys give equal tokens.
      sampler: (rng, logits_bv) -> tokens_b, a `sampling.Sampler` for example.
      valid_bt: bool, True for real prompt tokens; None is all.
      lengths: of prompts that are filled up on the right, and of the answer; pad_id follows it.
        Tokens are those of the shorter shapes. Needs a step that takes `length`.
      num_samples: continuations per prompt. They share one prefill.
      stop_ids: a row that draws one of these (it is kept) is filled up with pad_id, and the loop
        ends when all rows have.
      pad_id: see stop_ids.

    Returns:
      int32 tokens[B, num_samples, num_new].

    Raises:
      ValueError: num_new or num_samples below 1.
    """
    if num_new < 1 or num_samples < 1:
        raise ValueError(f"num_new {num_new} and num_samples {num_samples} must be at least 1")
    b = prompt_bt.shape[0]
    filled = {} if lengths is None else {"length": lengths.prompt}
    last = num_new if lengths is None else lengths.new
    logits_bv, cache = step(prompt_bt, cache, valid_bt=valid_bt, fresh=True, **filled)
    if num_samples > 1:
        index_r = jnp.repeat(jnp.arange(b), num_samples)
        logits_bv, cache = logits_bv[index_r], cache.rows(index_r)
    rows = b * num_samples

    def pick(i, logits_rv, done_r):
        token_r = sampler(jax.random.fold_in(rng, i), logits_rv)
        token_r = jnp.where(done_r, pad_id, token_r)
        for stop in stop_ids:
            done_r |= token_r == stop
        return token_r, done_r

    # The first token comes from the prefill, so the loop runs the network num_new - 1 times.
    token_r, done_r = pick(0, logits_bv, jnp.zeros(rows, bool))
    tokens_rt = jnp.full((rows, num_new), pad_id, jnp.int32).at[:, 0].set(token_r)

    def unfinished(state):
        i, _, done_r, _, _ = state
        return (i < last) & ~done_r.all()

    def extend(state):
        i, token_r, done_r, tokens_rt, cache = state
        logits_rv, cache = step(token_r[:, None], cache)
        token_r, done_r = pick(i, logits_rv, done_r)
        tokens_rt = jax.lax.dynamic_update_slice(tokens_rt, token_r[:, None], (0, i))
        return i + 1, token_r, done_r, tokens_rt, cache

    state = (jnp.int32(1), token_r, done_r, tokens_rt, cache)
    tokens_rt = jax.lax.while_loop(unfinished, extend, state)[3]
    return tokens_rt.reshape(b, num_samples, num_new)


def compile(
    bind: Callable[[Any], Any],
    make_cache: Callable[[int, int], Any],
    num_new: int,
    **options: Any,
) -> Callable[..., jax.Array]:
    """`generate` as one jitted function, see below.

    Args:
      bind: params -> network with a method `step`.
      make_cache: (rows, slots) -> empty cache.
      num_new: as in `generate`, like `options`.

    Returns:
      (params, prompt_bt, rng, valid_bt=None, knobs=None, lengths=None) -> tokens. Every prompt
      shape compiles once. `knobs`, a `sampling.Knobs`, take the place of the sampler's numbers;
      other values of them and of `lengths` compile nothing.
    """
    sampler = options.pop("sampler", sampling.GREEDY)

    @jax.jit
    def run(params, prompt_bt, rng, valid_bt=None, knobs=None, lengths=None):
        b, t = prompt_bt.shape
        cache = make_cache(b, t + num_new - 1)
        step = bind(params).step
        pick = sampler if knobs is None else functools.partial(sampler.draw, knobs)
        where = dict(valid_bt=valid_bt, lengths=lengths)
        return generate(step, cache, prompt_bt, num_new, rng, sampler=pick, **where, **options)

    return run
