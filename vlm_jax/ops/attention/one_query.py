"""A single query, as in the steps of a decoding loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.ops import matmul
from vlm_jax.ops.attention import structure


def attend(q_b1nh, k_bskh, v_bskh, bias, scale, **where):
    """The step of a decoding loop. Axis z is batch and key heads in one, as in the cache.

    There the reshapes cancel those around the cache, so that XLA's CPU backend multiplies it in
    place: with two axes, or with the query first, it copies the whole cache at every step (at
    2,048 slots that took ten times as long as everything else).
    """
    (b, _, n, h), (s, k) = q_b1nh.shape, k_bskh.shape[1:3]
    k_zsh, v_zsh = (x.swapaxes(1, 2).reshape(b * k, s, h) for x in (k_bskh, v_bskh))
    q_zgh = (q_b1nh * scale).reshape(b * k, n // k, h)
    scores_zgs = matmul.einsum("zsh,zgh->zgs", k_zsh, q_zgh, preferred_element_type=jnp.float32)
    if bias is not None:
        bias_bn1s = jnp.broadcast_to(bias.whole(), (b, n, 1, s))
        scores_zgs += bias_bn1s.reshape(b * k, n // k, s)
    mask_bts = structure.dense_mask(1, s, **where)
    if mask_bts is not None:
        mask_z1s = jnp.repeat(jnp.broadcast_to(mask_bts, (b, 1, s)), k, axis=0)
        scores_zgs = jnp.where(mask_z1s, scores_zgs, structure.MASKED)
    probs_zgs = jax.nn.softmax(scores_zgs, axis=-1).astype(v_bskh.dtype)
    return matmul.einsum("zgs,zsh->zgh", probs_zgs, v_zsh).reshape(b, 1, n, h)
