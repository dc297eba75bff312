"""The structure of a mask as callers give it, and as a dense mask."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from vlm_jax.ops import masks

# Score of a masked key: finite, so that the softmax of a row without any key is uniform, not NaN.
MASKED = -1e30


def dense_mask(
    t,
    s,
    *,
    causal=False,
    q_offset=None,
    q_segments_bt=None,
    kv_segments_bs=None,
    kv_valid_bs=None,
    prefix=0,
    mask_bts=None,
):
    """The same structure as mask_bts (b may be 1), or None where everything may be read."""
    parts = [] if mask_bts is None else [mask_bts]
    if prefix:
        parts.append(masks.prefix(t, prefix, s, 0 if q_offset is None else q_offset)[None])
    elif causal and t > 1:
        parts.append(masks.causal(t, s, 0 if q_offset is None else q_offset)[None])
    elif causal:
        slot = 0 if q_offset is None else q_offset
        parts.append((jnp.arange(s) <= slot)[None, None])
    if q_segments_bt is not None:
        parts.append(masks.segments(q_segments_bt, kv_segments_bs))
    if kv_valid_bs is not None:
        parts.append(kv_valid_bs[:, None, :])
    return functools.reduce(jnp.logical_and, parts) if parts else None


def pad_axis(x, axis, multiple, fill=0):
    """x with `fill` behind it, so that the axis is a multiple."""
    extra = -x.shape[axis] % multiple
    pad = [(0, extra if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pad, constant_values=fill) if extra else x


def may_be_empty(*, q_segments_bt=None, kv_segments_bs=None, kv_valid_bs=None, mask_bts=None, **_):
    """False where it is certain that every query reads a key: itself, at the least."""
    # One array for both: queries and keys are the same tokens.
    others = q_segments_bt is not kv_segments_bs
    return others or kv_valid_bs is not None or mask_bts is not None


def fill_empty(o_btnh, v_bskh, **where):
    """The output, with the stated result in rows of queries that may read no key.

    For kernels that leave out masked blocks, so that their own result there depends on the blocks.
    """
    if not may_be_empty(**where):
        return o_btnh
    t, s = o_btnh.shape[1], v_bskh.shape[1]
    empty_bt = ~dense_mask(t, s, **where).any(axis=2)
    mean_bkh = mean_value(v_bskh, axis=1).astype(o_btnh.dtype)
    mean_bnh = jnp.repeat(mean_bkh, o_btnh.shape[2] // v_bskh.shape[2], axis=1)
    return jnp.where(empty_bt[:, :, None, None], mean_bnh[:, None], o_btnh)


def mean_value(v, axis):
    """What a query gets that may read no key: the mean over all, masked ones too; float32."""
    return v.astype(jnp.float32).mean(axis=axis)
