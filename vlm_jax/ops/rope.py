"""Rotary position embeddings, half-split layout, float32.

Layout: feature i of a head is paired with feature i + h/2 (the layout of Hugging Face LLaMA
checkpoints). EasyLM, Meta and GGUF store *interleaved* pairs (2i, 2i + 1); `weights/` permutes
those on the way in. With the wrong layout shapes fit and the text is wrong.

Angles are p * theta^(-2i/h) in float32. The reference builds its table in the compute dtype, which
in bfloat16 is off by pi at position 4095 (a phase error, not rounding noise); we never do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def table(positions_bt: jax.Array, head_width: int, theta: float = 1e4):
    """Cosines and sines of the rotation angles.

    Args:
      positions_bt: int32, any leading shape.
      head_width: h, even.
      theta: base of the geometric series of frequencies.

    Returns:
      (cos, sin), float32[..., h/2].

    Raises:
      ValueError: odd head width.
    """
    if head_width % 2:
        raise ValueError(f"rotary embeddings need an even head width, got {head_width}")
    exponent = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    angles = positions_bt.astype(jnp.float32)[..., None] * (1.0 / theta**exponent)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_btnh: jax.Array, cos_bth: jax.Array, sin_bth: jax.Array) -> jax.Array:
    """Rotates every pair (i, i + h/2) of x by its angle; computed in float32, returned as x."""
    cos, sin = cos_bth[:, :, None], sin_bth[:, :, None]
    left, right = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x_btnh.dtype)
