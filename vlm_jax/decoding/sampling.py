"""logits -> next token, in the order suppress -> temperature -> top-k -> top-p.

The order matters: top-p after top-k measures the mass of what top-k left. It is the order of the
generation library that the LVM authors sample with, whose hidden default is top_k=50.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

_NEVER = -jnp.inf  # a logit that cannot be drawn


class Knobs(NamedTuple):
    """The numbers of a Sampler as arrays, which a compiled program takes as arguments."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to pick a token. Hashable, so it can be a static argument.

    Attributes:
      temperature: 0 is greedy (top_k and top_p are then without effect).
      top_k: keep the k largest logits, ties included; 0 keeps all.
      top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all.
      suppress_from: ids at or above are never drawn; None allows all. Visual ids come first and
        special ids last in LVM, so one number says it.
      suppress_ids: further ids that are never drawn.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    suppress_from: int | None = None
    suppress_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.temperature >= 0:  # NaN neither
            raise ValueError(f"temperature {self.temperature} is not from 0, which is greedy, on")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside (0, 1]; 1 keeps all tokens")

    def warp(self, logits_bv: jax.Array) -> jax.Array:
        """float32 logits of the distribution that is sampled from; -inf cannot be drawn."""
        logits_bv = self._suppress(logits_bv.astype(jnp.float32))
        if self.temperature:
            logits_bv = logits_bv / self.temperature
        if 0 < self.top_k < logits_bv.shape[-1]:
            kth_b1 = jax.lax.top_k(logits_bv, self.top_k)[0][:, -1:]
            logits_bv = jnp.where(logits_bv < kth_b1, _NEVER, logits_bv)
        if self.top_p < 1:
            logits_bv = _top_p(logits_bv, self.top_p)
        return logits_bv

    def __call__(self, rng: jax.Array, logits_bv: jax.Array) -> jax.Array:
        """int32 tokens_b. Rows draw independently from one key."""
        if self.temperature == 0:
            logits_bv = self._suppress(logits_bv.astype(jnp.float32))
            return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        return jax.random.categorical(rng, self.warp(logits_bv), axis=-1).astype(jnp.int32)

    def draw(self, knobs: Knobs, rng: jax.Array, logits_bv: jax.Array) -> jax.Array:
        """As a Sampler of these numbers draws, but they may be traced; of this one's own, only what
        is suppressed counts.
        """
        logits_bv = self._suppress(logits_bv.astype(jnp.float32))

        def sample():
            warm_bv = logits_bv / knobs.temperature
            kth_b1 = _kth_largest(warm_bv, knobs.top_k)
            off = (knobs.top_k <= 0) | (knobs.top_k >= warm_bv.shape[-1])
            kept_bv = jnp.where((warm_bv < kth_b1) & ~off, _NEVER, warm_bv)
            kept_bv = jax.lax.cond(
                knobs.top_p < 1, lambda: _top_p(kept_bv, knobs.top_p), lambda: kept_bv
            )
            return jax.random.categorical(rng, kept_bv, axis=-1).astype(jnp.int32)

        def best():
            return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)

        return jax.lax.cond(knobs.temperature > 0, sample, best)

    @property
    def knobs(self) -> Knobs:
        """Its numbers, for `draw`."""
        return Knobs(jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p))

    def _suppress(self, logits_bv):
        size = logits_bv.shape[-1]
        ids = jnp.arange(size)
        allowed_v = ids < (size if self.suppress_from is None else self.suppress_from)
        for token in self.suppress_ids:
            allowed_v &= ids != token
        return jnp.where(allowed_v, logits_bv, _NEVER)


GREEDY = Sampler(temperature=0.0)


def _kth_largest(x_bv: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest value of each row, k traced; float32[B, 1].

    Bisects over bit patterns, which order as the floats do once negative ones are turned: cheaper
    than sorting the vocabulary for every token.
    """
    bits_bv = jax.lax.bitcast_convert_type(x_bv, jnp.int32)
    ordered_bv = jnp.where(bits_bv < 0, bits_bv ^ jnp.int32(0x7FFFFFFF), bits_bv)

    def halve(_, bounds):
        low_b1, high_b1 = bounds  # at least k values are >= low, fewer are > high
        middle_b1 = (low_b1 >> 1) + (high_b1 >> 1) + ((low_b1 | high_b1) & 1)  # rounded up
        enough_b1 = (ordered_bv >= middle_b1).sum(-1, keepdims=True) >= k
        return jnp.where(enough_b1, middle_b1, low_b1), jnp.where(enough_b1, high_b1, middle_b1 - 1)

    ends = ordered_bv.min(-1, keepdims=True), ordered_bv.max(-1, keepdims=True)
    value_b1 = jax.lax.fori_loop(0, 32, halve, ends)[0]
    bits_b1 = jnp.where(value_b1 < 0, value_b1 ^ jnp.int32(0x7FFFFFFF), value_b1)
    return jax.lax.bitcast_convert_type(bits_b1, jnp.float32)


def _top_p(logits_bv, top_p):
    """Drops the tail: tokens such that they and all smaller ones sum to at most 1 - p."""
    order_bv = jnp.argsort(logits_bv, axis=-1)
    ascending_bv = jnp.take_along_axis(logits_bv, order_bv, axis=-1)
    tail_bv = jnp.cumsum(jax.nn.softmax(ascending_bv, axis=-1), axis=-1)
    # The most probable token always stays.
    drop_bv = (tail_bv <= 1 - top_p).at[:, -1].set(False)
    drop_bv = jnp.take_along_axis(drop_bv, jnp.argsort(order_bv, axis=-1), axis=-1)
    return jnp.where(drop_bv, _NEVER, logits_bv)
