"""Our own products, causal attention in blocks of queries that skip the keys behind them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.ops import matmul
from vlm_jax.ops.attention import one_query, structure

_BLOCK = 256  # queries per block; ours: best of 128..1024 on CPU, 1,024 tokens
_MAX_BLOCKS = 16  # the blocks are unrolled; longer sequences use larger ones


def attend(q_btnh, k_bskh, v_bskh, bias_bnts, scale, **where):
    """See the package."""
    b, t, n, h = q_btnh.shape
    s, k = k_bskh.shape[1:3]
    if t == 1 and bias_bnts is None:
        return one_query.attend(q_btnh, k_bskh, v_bskh, scale, **where)
    q_bkgth = (q_btnh * scale).reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
    k_bksh, v_bksh = k_bskh.swapaxes(1, 2), v_bskh.swapaxes(1, 2)
    if bias_bnts is not None:
        heads = (k, n // k) if bias_bnts.shape[1] == n else (1, 1)
        bias = bias_bnts.reshape(bias_bnts.shape[0], *heads, *bias_bnts.shape[2:])

    triangle = where["causal"] and where["q_offset"] is None and t == s and t > 1
    block = max(_BLOCK, -(-t // _MAX_BLOCKS)) if triangle else t
    prefix, mask_bts = where["prefix"], where["mask_bts"]
    outputs = []
    for start in range(0, t, block):
        rows = slice(start, min(start + block, t))
        cols = slice(0, max(rows.stop, prefix) if triangle else s)
        scores = matmul.einsum(
            "bkgth,bksh->bkgts",
            q_bkgth[:, :, :, rows],
            k_bksh[:, :, cols],
            preferred_element_type=jnp.float32,
        )
        if bias_bnts is not None:
            some = bias if bias.shape[3] == 1 else bias[:, :, :, rows]
            scores += some if some.shape[4] == 1 else some[..., cols]
        allowed_bts = structure.dense_mask(
            rows.stop - start,
            cols.stop,
            causal=where["causal"],
            q_offset=start if triangle else where["q_offset"],
            q_segments_bt=_part(where["q_segments_bt"], rows),
            kv_segments_bs=_part(where["kv_segments_bs"], cols),
            kv_valid_bs=_part(where["kv_valid_bs"], cols),
            prefix=prefix,
            mask_bts=None if mask_bts is None else mask_bts[:, rows, cols],
        )
        if allowed_bts is not None:
            scores = jnp.where(allowed_bts[:, None, None], scores, structure.MASKED)
        # Normalised after the product with v, where the sum is over h instead of s: the backward
        # pass then has no reduction over [t, s] either. The maximum cancels, in the gradient too.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        o_bkgth = matmul.einsum(
            "bkgts,bksh->bkgth",
            weights.astype(v_bskh.dtype),
            v_bksh[:, :, cols],
            preferred_element_type=jnp.float32,
        )
        o_bkgth /= weights.sum(axis=-1, keepdims=True)
        outputs.append(o_bkgth.astype(v_bskh.dtype))
    o_bkgth = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
    return o_bkgth.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _part(x_bs, part):
    return None if x_bs is None else x_bs[:, part]
