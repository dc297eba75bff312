"""Dropout and stochastic depth. Keys are passed; without one nothing is dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def dropout(x, rate: float, rng: jax.Array | None, *, shared: tuple[int, ...] = ()):
    """Zeros with probability `rate`, everything else divided by 1 - rate (arXiv 1207.0580).

    Args:
      x: any shape and dtype.
      rate: 0..1, below 1.
      rng: None drops nothing: evaluation.
      shared: axes along which one draw counts for all; T5 shares it over the tokens.

    Raises:
      ValueError: another rate.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate of {rate}; it must be at least 0 and below 1")
    if rng is None or not rate:
        return x
    shared = {axis % x.ndim for axis in shared}
    sizes = [1 if axis in shared else size for axis, size in enumerate(x.shape)]
    kept = jax.random.bernoulli(rng, 1 - rate, sizes)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def drop_path(update, rate: float, rng: jax.Array | None):
    """Stochastic depth (Huang et al., arXiv 1603.09382): a row's whole update is dropped, or none.

    Args:
      update: [B, ...], what a block would add to its input.
      rate, rng: as in `dropout`.
    """
    return dropout(update, rate, rng, shared=tuple(range(1, update.ndim)))


def rates(last: float, depth: int) -> list[float]:
    """Rates of blocks, linear from 0 at the first to `last`."""
    return [float(rate) for rate in np.linspace(0.0, last, depth)]
