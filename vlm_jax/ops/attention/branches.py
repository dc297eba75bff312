"""One query of each of several branches behind a shared prefix."""

from __future__ import annotations

import jax.numpy as jnp

from vlm_jax.ops import matmul
from vlm_jax.ops.attention import structure


def attend_branches(
    q_brnh,
    prefix_k_bskh,
    prefix_v_bskh,
    own_k_brkth,
    own_v_brkth,
    length,
    *,
    prefix_valid_bs=None,
    scale: float | None = None,
):
    """One query of each of r branches: it reads a prefix that all share, and its branch's keys.

    The softmax over both is done in two parts that are merged by their maxima and sums, so the
    prefix is never repeated: its part is one product with r * n / k queries per key head.

    Args:
      q_brnh: queries, rotated, not yet scaled.
      prefix_k_bskh, prefix_v_bskh: the shared keys and values.
      own_k_brkth, own_v_brkth: each branch's own; axis t is slots.
      length: int32, slots in use; at least 1, so that every query reads a key.
      prefix_valid_bs: bool, prefix keys that are real.
      scale: as in `attend`.

    Returns:
      o_brnh in v's dtype.
    """
    (b, r, n, h), (s, k) = q_brnh.shape, prefix_k_bskh.shape[1:3]
    g = n // k
    q_brnh = q_brnh * (h**-0.5 if scale is None else scale)
    # Axis z is batch and key heads in one, as in the cache; see one_query.py.
    k_zsh, v_zsh = (x.swapaxes(1, 2).reshape(b * k, s, h) for x in (prefix_k_bskh, prefix_v_bskh))
    q_zqh = q_brnh.reshape(b, r, k, g, h).swapaxes(1, 2).reshape(b * k, r * g, h)
    scores_zqs = matmul.einsum("zqh,zsh->zqs", q_zqh, k_zsh, preferred_element_type=jnp.float32)
    if prefix_valid_bs is not None:
        valid_z1s = jnp.repeat(prefix_valid_bs, k, axis=0)[:, None]
        scores_zqs = jnp.where(valid_z1s, scores_zqs, structure.MASKED)
    top_zq = scores_zqs.max(axis=-1)
    weights_zqs = jnp.exp(scores_zqs - top_zq[..., None])
    o_zqh = matmul.einsum(
        "zqs,zsh->zqh", weights_zqs.astype(v_zsh.dtype), v_zsh, preferred_element_type=jnp.float32
    )

    def branch(x):
        return x.reshape(b, k, r, g, *x.shape[2:]).swapaxes(1, 2)

    o_brkgh, top_brkg, mass_brkg = map(branch, (o_zqh, top_zq, weights_zqs.sum(axis=-1)))

    # Products, however small: XLA's CPU backend does not vectorise sums of products over one axis.
    f32 = dict(preferred_element_type=jnp.float32)
    q_brkgh = q_brnh.reshape(b, r, k, g, h)
    scores_brkgt = matmul.einsum("brkgh,brkth->brkgt", q_brkgh, own_k_brkth, **f32)
    used_t = jnp.arange(own_k_brkth.shape[3]) < length
    scores_brkgt = jnp.where(used_t, scores_brkgt, structure.MASKED)
    merged_brkg = jnp.maximum(top_brkg, scores_brkgt.max(axis=-1))
    weights_brkgt = jnp.exp(scores_brkgt - merged_brkg[..., None])
    own_brkgh = matmul.einsum(
        "brkgt,brkth->brkgh", weights_brkgt.astype(own_v_brkth.dtype), own_v_brkth, **f32
    )
    rescale_brkg = jnp.exp(top_brkg - merged_brkg)
    mass_brkg = mass_brkg * rescale_brkg + weights_brkgt.sum(axis=-1)
    o_brkgh = (o_brkgh * rescale_brkg[..., None] + own_brkgh) / mass_brkg[..., None]
    return o_brkgh.reshape(b, r, n, h).astype(own_v_brkth.dtype)
