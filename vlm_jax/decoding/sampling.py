"""logits -> next token, in the order suppress -> temperature -> top-k -> top-p.

The order matters: top-p after top-k measures the mass of what top-k left. It is the order of the
generation library that the LVM authors sample with, whose hidden default is top_k=50.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

_NEVER = -jnp.inf  # a logit that cannot be drawn


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
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative; 0 is greedy")
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

    def _suppress(self, logits_bv):
        size = logits_bv.shape[-1]
        ids = jnp.arange(size)
        allowed_v = ids < (size if self.suppress_from is None else self.suppress_from)
        for token in self.suppress_ids:
            allowed_v &= ids != token
        return jnp.where(allowed_v, logits_bv, _NEVER)


GREEDY = Sampler(temperature=0.0)


def _top_p(logits_bv, top_p):
    """Drops the tail: tokens such that they and all smaller ones sum to at most 1 - p."""
    order_bv = jnp.argsort(logits_bv, axis=-1)
    ascending_bv = jnp.take_along_axis(logits_bv, order_bv, axis=-1)
    tail_bv = jnp.cumsum(jax.nn.softmax(ascending_bv, axis=-1), axis=-1)
    # The most probable token always stays.
    drop_bv = (tail_bv <= 1 - top_p).at[:, -1].set(False)
    drop_bv = jnp.take_along_axis(drop_bv, jnp.argsort(order_bv, axis=-1), axis=-1)
    return jnp.where(drop_bv, _NEVER, logits_bv)
