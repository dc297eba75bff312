"""The structure of a mask as callers give it, and as a dense mask."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from vlm_jax.ops import masks

# Score of a masked key: finite, so that a row without any key gives a mean rather than NaN.
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
