"""Logits processors: what changes the logits of the next token by what was drawn before.

    state = processor.init((rows,), vocabulary)
    logits = processor(logits, state)                  before every draw
    state = processor.update(state, tokens, source)    behind it

Shapes have any leading axes: [R] rows of `generate`, [B, W] beams of `beam`. A processor that needs
no memory has None for a state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Processor(Protocol):
    """See the top of this file."""

    def init(self, shape: tuple[int, ...], vocabulary: int) -> Any:
        """The state before the first token, for rows of this shape."""

    def __call__(self, logits: jax.Array, state: Any) -> jax.Array:
        """float32 logits [..., V] -> the same shape."""

    def update(self, state: Any, tokens: jax.Array, source: jax.Array | None) -> Any:
        """The state behind int32 tokens [...].

        Args:
          state: of before.
          tokens: what every row drew.
          source: int32 [B, W], the beam that each of the new beams continues; None: rows stay.
        """


@dataclasses.dataclass(frozen=True)
class Penalty:
    """Divides the logits of ids that were drawn before, once each.

    As published with NXTP (arXiv 2312.02142), negative logits are divided, too: they grow.

    Attributes:
      value: 0 or 1 is none.
    """

    value: float

    def init(self, shape, vocabulary):
        """bool [..., V]: nothing seen."""
        return jnp.zeros((*shape, vocabulary), bool)

    def __call__(self, logits, state):
        """See the class."""
        if self.value in (0, 1):
            return logits
        return jnp.where(state, logits / self.value, logits)

    def update(self, state, tokens, source):
        """Marks what was drawn."""
        if source is not None:
            state = jnp.take_along_axis(state, source[..., None], axis=-2)
        return state | (tokens[..., None] == jnp.arange(state.shape[-1]))


def start(
    processors: Sequence[Processor], shape: tuple[int, ...], vocabulary: int
) -> tuple[Any, ...]:
    """Their states before the first token."""
    return tuple(processor.init(shape, vocabulary) for processor in processors)


def apply(processors: Sequence[Processor], logits: jax.Array, states: tuple[Any, ...]) -> jax.Array:
    """float32 logits behind all of them, in their order."""
    logits = logits.astype(jnp.float32)
    for processor, state in zip(processors, states, strict=True):
        logits = processor(logits, state)
    return logits


def update(
    processors: Sequence[Processor],
    states: tuple[Any, ...],
    tokens: jax.Array,
    source: jax.Array | None = None,
) -> tuple[Any, ...]:
    """Their states behind these tokens."""
    return tuple(
        processor.update(state, tokens, source)
        for processor, state in zip(processors, states, strict=True)
    )
