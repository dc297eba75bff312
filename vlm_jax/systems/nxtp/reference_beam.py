"""Beam search as NXTP's released program does it (arXiv 2312.02142, table 5).

A surviving beam's tokens move to their new place, but the vectors that the network reads do not
follow them, so that a beam that moved is continued from another one's past; the penalty hits the
ids of the prompt and of every sequence that was ever at the beam's place; and scores are divided by
the length with the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.decoding import beam, processors


@dataclasses.dataclass(frozen=True)
class PlacePenalty:
    """A penalty on the ids of the prompt and of every sequence that was ever at the beam's place.

    Attributes:
      value: as of `processors.Penalty`.
      prompt_bt: int32 ids; None is no prompt.
    """

    value: float
    prompt_bt: jax.Array | None = None

    def init(self, shape, vocabulary):
        """(ids of the beam's own sequence, ids that count), both bool [B, W, V]."""
        own = processors.Penalty(self.value).init(shape, vocabulary)
        place = own
        if self.prompt_bt is not None:
            place = place.at[jnp.arange(len(place))[:, None], :, self.prompt_bt].set(True)
        return own, place

    def __call__(self, logits, state):
        """See the class."""
        return processors.Penalty(self.value)(logits, state[1])

    def update(self, state, tokens, source):
        """The own ids move with the beam, those of the place only grow."""
        own = processors.Penalty(self.value).update(state[0], tokens, source)
        return own, state[1] | own


def compile(
    bind: Callable[[Any], Any], *, penalty: float = 0.0, **options: Any
) -> Callable[..., beam.Beams]:
    """One jitted function of (params, prefix_btd, prompt_bt=None, valid_bt=None).

    Args:
      bind: params -> network.
      penalty: divides logits; 0 or 1 is none.
      **options: of `beam.decode`.
    """

    @jax.jit
    def run(params, prefix_btd, prompt_bt=None, valid_bt=None):
        return beam.decode(
            bind(params),
            prefix_btd,
            valid_bt=valid_bt,
            logits_processors=(PlacePenalty(penalty, prompt_bt),),
            extra_length=0 if prompt_bt is None else prompt_bt.shape[1],
            follow=False,
            **options,
        )

    return run
