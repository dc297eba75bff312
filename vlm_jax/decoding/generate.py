"""Generation: one prefill, then one `while_loop` that holds every further token.

    prompt ─ step ─┬─ repeat for n samples ─ draw ─ feed ─ step ─ draw ─ feed ─ ... ─ tokens
    (empty cache)  └─ cache ───────────────────────── cache ──────────────────┘

The network offers `embed(tokens) -> vectors`, `make_cache(rows, slots)` and
`step(x_btd, cache, valid_bt=, ...) -> (logits_bv, hidden_bd, cache)`; the cache has `rows(index_r)`
that selects rows, and `fork(n, slots)` for samples that share a prompt. `models.llama` is one, and
`models.caches` says what they are. What follows a token is the business of a feed (`feeds`), what
changes logits by the past is a processor (`processors`). Prompts and answers of other lengths
compile nothing when they are filled up to a common shape, see `Lengths`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.decoding import feeds, processors, sampling


class Lengths(NamedTuple):
    """How much of a shape is used, int32 scalars that a compiled program takes as arguments.

    Attributes:
      prompt: of the first vectors of every prompt; what stands behind is not read.
      new: tokens to generate, up to num_new.
    """

    prompt: jax.Array
    new: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """Continuations of every prompt.

    Attributes:
      tokens_bst: int32[B, num_samples, num_new]; behind its end a row has the pad id.
      lengths_bs: int32, tokens of a row, its stop id included.
      carry: what the feed remembered, B * num_samples rows.
      logp_bst: float32, log probability of every token in the distribution that it was drawn from;
        0 behind the end. None if not asked for.
    """

    tokens_bst: jax.Array
    lengths_bs: jax.Array
    carry: Any = None
    logp_bst: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Of the loop, between two tokens; r is prompts times samples.

    Attributes:
      index: int32, tokens drawn so far.
      x_rd: what the network reads next.
      done_r: bool, rows that have ended.
      tokens_rt, logp_rt: so far.
      lengths_r: int32, tokens of a row so far.
      cache, carry, memory: of the network, the feed, the processors.
    """

    index: jax.Array
    x_rd: jax.Array
    done_r: jax.Array
    tokens_rt: jax.Array
    logp_rt: jax.Array | None
    lengths_r: jax.Array
    cache: Any
    carry: Any
    memory: tuple[Any, ...]


def generate(
    network: Any,
    prompt_btd: jax.Array,
    num_new: int,
    rng: jax.Array,
    *,
    cache: Any = None,
    feed: feeds.Feed | None = None,
    carry: Any = None,
    sampler: Any = sampling.GREEDY,
    logits_processors: Sequence[processors.Processor] = (),
    valid_bt: jax.Array | None = None,
    prefix_block: int = 0,
    lengths: Lengths | None = None,
    num_samples: int = 1,
    share_prompt: bool = False,
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    logp: bool = False,
) -> Generated:
    """Continues every prompt `num_samples` times. Traceable; `compile` wraps it in a jit.

    Args:
      network: over the parameters of this trace, see the top of this file.
      prompt_btd: vectors; what they are is the caller's business (`network.embed(tokens)`).
      num_new: tokens to generate, at least 1; static.
      rng: key; equal keys give equal tokens.
      cache: empty, with B rows and T + num_new - 1 slots or more (T with share_prompt); None makes
        one. An encoder-decoder network brings the one that holds its encoder's keys.
      feed: what follows a token; None is the embedding table.
      carry: of the feed, with B * num_samples rows.
      sampler: (rng, logits_rv) -> tokens_r, a `sampling.Sampler` for example.
      logits_processors: applied before the sampler, in order.
      valid_bt: bool, True for real vectors; None is all. Shorter prompts are padded on the left;
        with share_prompt either side will do.
      prefix_block: the first so many vectors see each other both ways (an image); static.
      lengths: of prompts that are filled up on the right, and of the answer; pad_id follows it.
        Tokens are those of the shorter shapes. Needs a step that takes `length`.
      num_samples: continuations per prompt. They share one prefill.
      share_prompt: they share its keys, too: less memory for many samples of long prompts.
      stop_ids: a row that draws one of these (it is kept) is filled up with pad_id, and the loop
        ends when all rows have.
      pad_id: see stop_ids.
      logp: whether to return log probabilities, which needs a sampler with `warp`.

    Returns:
      Generated.

    Raises:
      ValueError: num_new or num_samples below 1.
    """
    if num_new < 1 or num_samples < 1:
        raise ValueError(f"num_new {num_new} and num_samples {num_samples} must be at least 1")
    b, t, _ = prompt_btd.shape
    feed = feed or feeds.tokens(network.embed)
    if cache is None:
        cache = network.make_cache(b, t if share_prompt else t + num_new - 1)
    context: dict[str, Any] = {} if valid_bt is None else dict(valid_bt=valid_bt)
    if prefix_block:
        context.update(prefix_block=prefix_block)
    if lengths is not None:
        context["length"] = lengths.prompt
    last = num_new if lengths is None else lengths.new
    logits_rv, hidden_rd, cache = network.step(prompt_btd, cache, **context)

    rows = b * num_samples
    if share_prompt:
        cache = cache.fork(num_samples, num_new - 1)
    if num_samples > 1:
        index_r = jnp.repeat(jnp.arange(b), num_samples)
        logits_rv, hidden_rd = logits_rv[index_r], hidden_rd[index_r]
        cache = cache if share_prompt else cache.rows(index_r)

    def draw(state, logits_rv, hidden_rd):
        """The state with one more token."""
        i = state.index
        logits_rv = processors.apply(logits_processors, logits_rv, state.memory)
        token_r = sampler(jax.random.fold_in(rng, i), logits_rv)
        token_r = jnp.where(state.done_r, pad_id, token_r)
        live_r = ~state.done_r
        done_r = state.done_r
        for stop in stop_ids:
            done_r |= token_r == stop
        x_rd, carry = feed(feeds.Drawn(i, token_r, hidden_rd, live_r), state.carry)
        logp_rt = state.logp_rt
        if logp_rt is not None:
            logp_rv = jax.nn.log_softmax(sampler.warp(logits_rv), axis=-1)
            logp_r = jnp.take_along_axis(logp_rv, token_r[:, None], axis=1)[:, 0]
            logp_rt = _put(logp_rt, jnp.where(live_r, logp_r, 0.0), i)
        return State(
            i + 1,
            x_rd,
            done_r,
            _put(state.tokens_rt, token_r, i),
            logp_rt,
            state.lengths_r + live_r,
            state.cache,
            carry,
            processors.update(logits_processors, state.memory, token_r),
        )

    # The first token comes from the prefill, so the loop runs the network num_new - 1 times.
    state = State(
        jnp.int32(0),
        hidden_rd,
        jnp.zeros(rows, bool),
        jnp.full((rows, num_new), pad_id, jnp.int32),
        jnp.zeros((rows, num_new), jnp.float32) if logp else None,
        jnp.zeros(rows, jnp.int32),
        cache,
        carry,
        processors.start(logits_processors, (rows,), logits_rv.shape[-1]),
    )
    state = draw(state, logits_rv, hidden_rd)

    def unfinished(state):
        return (state.index < last) & ~state.done_r.all()

    def extend(state):
        shape = (b, num_samples) if share_prompt else (rows, 1)
        *found, cache = network.step(state.x_rd.reshape(*shape, -1), state.cache)
        logits_rv, hidden_rd = (x.reshape(rows, -1) for x in found)
        return draw(dataclasses.replace(state, cache=cache), logits_rv, hidden_rd)

    state = jax.lax.while_loop(unfinished, extend, state)
    per_prompt = (b, num_samples)
    return Generated(
        state.tokens_rt.reshape(*per_prompt, num_new),
        state.lengths_r.reshape(per_prompt),
        state.carry,
        None if state.logp_rt is None else state.logp_rt.reshape(*per_prompt, num_new),
    )


def _put(x_rt, value_r, i):
    return jax.lax.dynamic_update_slice(x_rt, value_r[:, None].astype(x_rt.dtype), (0, i))


def compile(bind: Callable[[Any], Any], num_new: int, **options: Any) -> Callable[..., Generated]:
    """`generate` of tokens as one jitted function, see below.

    Args:
      bind: params -> network.
      num_new: as in `generate`, like `options`.

    Returns:
      (params, prompt_bt, rng, valid_bt=None, knobs=None, lengths=None) -> Generated. Every prompt
      shape compiles once. `knobs`, a `sampling.Knobs`, take the place of the sampler's numbers;
      other values of them and of `lengths` compile nothing.
    """
    sampler = options.pop("sampler", sampling.GREEDY)

    @jax.jit
    def run(params, prompt_bt, rng, valid_bt=None, knobs=None, lengths=None):
        network = bind(params)
        pick = sampler if knobs is None else functools.partial(sampler.draw, knobs)
        where = dict(valid_bt=valid_bt, lengths=lengths)
        prompt_btd = network.embed(prompt_bt)
        return generate(network, prompt_btd, num_new, rng, sampler=pick, **where, **options)

    return run
