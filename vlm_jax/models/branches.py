"""Several continuations of one prefix: its keys and values are stored once, never repeated.

    prefix   s s s s s s s           one row per image: computed by the prefill
                         |- t t t    branch 0: own keys only
                         |- t t t    branch 1
                         |- t t t    ...

A branch reads the whole prefix and its own tokens, no other branch. Within a call the branches take
the place of the token axis: [B, R, D] is one token of each of R branches, so that every matrix
product has B * R rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branches:
    """The cache of R continuations per image; a pytree, passed in and returned.

    Attributes:
      prefix: the cache of the prefix, B rows; read only.
      own: its `layers`' tree with leaves [(L,) B, R, K, T, H].
      index: int32, the next free slot of `own`.
    """

    prefix: Any
    own: dict
    index: jax.Array

    def select(self, index_bw: jax.Array) -> Branches:
        """The branches with these numbers; W may be smaller than R."""

        def take(x):
            leading = (1,) * (x.ndim - 5)
            index = index_bw.reshape(*leading, *index_bw.shape, 1, 1, 1)
            return jnp.take_along_axis(x, index, axis=-4)

        return dataclasses.replace(self, own=jax.tree.map(take, self.own))


def fork(prefix: Any, num_branches: int, num_slots: int) -> Branches:
    """Starts `num_branches` continuations behind a prefix, with room for `num_slots` tokens each.

    Args:
      prefix: a `llama.Cache` that holds the prefix and no free slots.
    """
    b = prefix.valid_bs.shape[0]

    def empty(x):
        *stack, z, _, h = x.shape
        return jnp.zeros((*stack, b, num_branches, z // b, num_slots, h), x.dtype)

    return Branches(prefix, jax.tree.map(empty, prefix.layers), jnp.zeros((), jnp.int32))


def write(own_brkth: jax.Array, new_brkh: jax.Array, index: jax.Array) -> jax.Array:
    """Puts one new key or value of every branch into slot `index`."""
    new = new_brkh[:, :, :, None].astype(own_brkth.dtype)
    return jax.lax.dynamic_update_slice(own_brkth, new, (0, 0, 0, index, 0))
