"""What a network reads next: the vector that follows a drawn token.

A feed is a function `(drawn, carry) -> (x, carry)`. It sees the token and the hidden state that the
token was drawn from, and remembers in its carry what it likes: a system that reads a point at every
step keeps the points there, one that answers a location token with the embedding of a box keeps
what came before. It is called behind every token that is drawn, the last one too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one step of a loop drew. Leading axes: [R] rows of `generate`, [B, W] beams of `beam`.

    Attributes:
      index: int32, tokens drawn before this one; the same for all rows.
      token: int32 [...]. Of rows that have ended, the pad id.
      hidden: [..., D], the state behind the vectors so far, from which the token was drawn.
      live: bool [...], rows that had not ended before this token.
    """

    index: jax.Array
    token: jax.Array
    hidden: jax.Array
    live: jax.Array


Feed = Callable[[Drawn, Any], tuple[jax.Array, Any]]


def tokens(embed: Callable[[jax.Array], jax.Array]) -> Feed:
    """The rows of an embedding table, as language models have it.

    Args:
      embed: int32 [A, B] -> [A, B, D].
    """

    def feed(drawn, carry):
        token = drawn.token
        flat = token[:, None] if token.ndim == 1 else token
        x = embed(flat)
        return (x[:, 0] if token.ndim == 1 else x), carry

    return feed
