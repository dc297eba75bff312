"""Our own products, in blocks of queries.

Causal attention of a sequence to itself: every block reads only the keys at or before it, and XLA
sees all blocks at once. Any other attention that is long: one block after another in a loop, with
its scores computed again for the gradient, so that those of one block are all that is ever held.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from vlm_jax.ops import matmul
from vlm_jax.ops.attention import one_query, structure
from vlm_jax.ops.attention.bias import part_of

_BLOCK = 256  # queries per block; ours: best of 128..1024 on CPU, 1,024 tokens
_MAX_BLOCKS = 16  # causal blocks are unrolled; longer sequences use larger ones
_LONG = 2**22  # scores per head from which on attention that is not causal goes in blocks


def attend(q_btnh, k_bskh, v_bskh, bias, scale, **where):
    """See the package."""
    b, t, n, h = q_btnh.shape
    s, k = k_bskh.shape[1:3]
    if t == 1:
        return one_query.attend(q_btnh, k_bskh, v_bskh, bias, scale, **where)
    q_bkgth = (q_btnh * scale).reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
    k_bksh, v_bksh = k_bskh.swapaxes(1, 2), v_bskh.swapaxes(1, 2)
    block = functools.partial(_block, q_bkgth, k_bksh, v_bksh, bias, where=where)
    triangle = where["causal"] and where["q_offset"] is None and t == s
    if triangle:
        size = max(_BLOCK, -(-t // _MAX_BLOCKS))
        ends = [min(start + size, t) for start in range(0, t, size)]
        outputs = [
            block(start, end - start, keys=max(end, where["prefix"]))
            for start, end in zip(range(0, t, size), ends)
        ]
    elif t * s < _LONG:
        outputs = [block(0, t, keys=s)]
    else:
        loop = jax.checkpoint(lambda start: block(start, _BLOCK, keys=s))
        o_ibkgth = jax.lax.map(loop, jnp.arange(t // _BLOCK) * _BLOCK)
        outputs = [jnp.moveaxis(o_ibkgth, 0, 3).reshape(b, k, n // k, -1, h)]
        if t % _BLOCK:
            outputs.append(block(t - t % _BLOCK, t % _BLOCK, keys=s))
    o_bkgth = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
    return o_bkgth.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _block(q_bkgth, k_bksh, v_bksh, bias, start, size, *, keys, where):
    """o_bkgth of `size` queries from `start` on, which read no key behind the first `keys`."""
    k, g = q_bkgth.shape[1:3]
    s, cols = k_bksh.shape[2], slice(0, keys)
    rows = functools.partial(part_of, start=start, size=size)
    scores = matmul.einsum(
        "bkgth,bksh->bkgts",
        rows(q_bkgth, axis=3),
        k_bksh[:, :, cols],
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        bias_bnts = bias.part(start, size, cols)
        heads = (k, g) if bias_bnts.shape[1] == k * g else (1, 1)
        scores += bias_bnts.reshape(bias_bnts.shape[0], *heads, *bias_bnts.shape[2:])
    first = 0 if where["q_offset"] is None else where["q_offset"]
    allowed_bts = structure.dense_mask(
        size,
        keys,
        causal=where["causal"],
        q_offset=first + start,
        q_segments_bt=rows(where["q_segments_bt"], axis=1),
        kv_segments_bs=part_of(where["kv_segments_bs"], 0, keys, axis=1),
        kv_valid_bs=part_of(where["kv_valid_bs"], 0, keys, axis=1),
        prefix=where["prefix"],
        mask_bts=part_of(rows(where["mask_bts"], axis=1), 0, keys, axis=2),
    )
    if allowed_bts is not None:
        scores = jnp.where(allowed_bts[:, None, None], scores, structure.MASKED)
    # Normalised after the product with v, where the sum is over h instead of s: the backward pass
    # then has no reduction over [t, s] either. The maximum cancels, in the gradient too.
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    o_bkgth = matmul.einsum(
        "bkgts,bksh->bkgth",
        weights.astype(v_bksh.dtype),
        v_bksh[:, :, cols],
        preferred_element_type=jnp.float32,
    )
    o_bkgth /= weights.sum(axis=-1, keepdims=True)
    if keys < s and structure.may_be_empty(**where):
        mean_bkh = structure.mean_value(v_bksh, axis=2)
        o_bkgth = jnp.where(top <= structure.MASKED, mean_bkh[:, :, None, None], o_bkgth)
    return o_bkgth.astype(v_bksh.dtype)
