"""Softmax attention: the only one in the repository, a file for each implementation.

Callers give the *structure* of the mask; the implementation decides whether it needs a dense one:

    xla      `jax.nn.dot_product_attention` with a dense mask; takes every call on every platform.
    blocks   CPU, and the steps of a decoding loop everywhere: our own products. Causal attention
             goes in query blocks that read only the keys at or before them, so half of the scores
             of a long sequence are never computed; a single query multiplies the cache in place.
    cudnn    GPU, bfloat16 or float16. Plain causal attention needs no mask at all; a dense mask
             would become an additive bias, so only segments and padding pay for one.
    splash   TPU, sequences and head widths padded to 128; causal and segment masks are built in.

A query that may read no key (padding, as a rule) gets the mean of v over all keys, masked ones
included, as in T5, whatever the implementation; no gradient reaches q and k through it.

Head widths that a kernel does not take (100 of LVM-3B) are padded with zeros, which is exact: zero
features add nothing to a score and give zero output features. The scale stays that of the true
width.
"""

from __future__ import annotations

import jax.numpy as jnp

from vlm_jax.ops import partition
from vlm_jax.ops.attention import blocks, cudnn, splash, xla
from vlm_jax.ops.attention.bias import BucketBias, DenseBias, GridBias, t5_buckets
from vlm_jax.ops.attention.branches import attend_branches

__all__ = ["BucketBias", "GridBias", "attend", "attend_branches", "choose", "t5_buckets"]


def attend(
    q_btnh,
    k_bskh,
    v_bskh,
    *,
    causal: bool = False,
    q_offset=None,
    q_segments_bt=None,
    kv_segments_bs=None,
    kv_valid_bs=None,
    prefix: int = 0,
    mask_bts=None,
    bias_bnts=None,
    bias: GridBias | BucketBias | None = None,
    scale: float | None = None,
    implementation: str | None = None,
):
    """Softmax attention. Scores and softmax are float32, the result has v's dtype.

    Args:
      q_btnh: queries, rotated if the network uses RoPE, not yet scaled.
      k_bskh, v_bskh: keys and values. s is t, or the cache length when decoding. Fewer heads than
        the queries (k divides n) is grouped-query attention: head i reads key head i // (n / k).
      causal: query i reads keys up to its own slot.
      q_offset: slot of query 0 among the keys, for a cache; int or int32 scalar. None is 0.
      q_segments_bt, kv_segments_bs: int32 document numbers; only equal ones see each other.
      kv_valid_bs: bool, keys that are real. A row without any gets the mean of all values.
      prefix: the first so many keys are read by every query although `causal`: an image in front
        of text (`masks.prefix`).
      mask_bts: bool, any further restriction; dense for every implementation. b may be 1.
      bias_bnts: added to the scores; axes of size 1 broadcast.
      bias: the same with a structure: `GridBias` (SAM) or `BucketBias` (T5), never made as a whole
        where the implementation can do without. Not scaled.
      scale: factor on the scores; None is 1/sqrt(h). T5 passes 1.
      implementation: 'xla', 'blocks', 'cudnn', 'splash', or None for the best that takes this
        call.

    Returns:
      o_btnh.

    Raises:
      ValueError: heads that do not group, one of the two segment arrays missing, unknown name, a
        prefix together with a cache's offset, both kinds of bias, a bias of other sizes.
    """
    n, h, k = q_btnh.shape[2], q_btnh.shape[3], k_bskh.shape[2]
    if n % k:
        raise ValueError(f"{n} query heads cannot share {k} key heads; n must be a multiple of k")
    if (q_segments_bt is None) != (kv_segments_bs is None):
        raise ValueError("give both q_segments_bt and kv_segments_bs, or neither")
    if prefix and q_offset is not None:
        raise ValueError("prefix is for queries that start at slot 0; q_offset was given as well")
    if bias is not None:
        if bias_bnts is not None:
            raise ValueError("give bias or bias_bnts, not both")
        bias.check(q_btnh.shape[0], n, q_btnh.shape[1], k_bskh.shape[1])
    scale = h**-0.5 if scale is None else scale
    where = dict(
        causal=causal,
        q_offset=q_offset,
        q_segments_bt=q_segments_bt,
        kv_segments_bs=kv_segments_bs,
        kv_valid_bs=kv_valid_bs,
        prefix=prefix if causal else 0,
        mask_bts=mask_bts,
    )
    given = dict(bias_bnts=bias_bnts, bias=bias)
    implementation = implementation or choose(q_btnh, k_bskh, **given, **where)
    bias = bias if bias_bnts is None else DenseBias(bias_bnts)
    match implementation:
        case "xla":
            return xla.attend(q_btnh, k_bskh, v_bskh, bias, scale, **where)
        case "blocks":
            return blocks.attend(q_btnh, k_bskh, v_bskh, bias, scale, **where)
        case "cudnn":
            return cudnn.attend(q_btnh, k_bskh, v_bskh, bias, scale, **where)
        case "splash":
            return splash.attend(q_btnh, k_bskh, v_bskh, bias, scale, **where)
    known = "xla, blocks, cudnn, splash"
    raise ValueError(f"unknown attention implementation {implementation!r}; known: {known}")


def choose(q_btnh, k_bskh, *, q_offset=None, bias_bnts=None, mask_bts=None, bias=None, **_) -> str:
    """The fastest implementation that takes these arguments on the platform of this trace."""
    (_, t, _, h), s = q_btnh.shape, k_bskh.shape[1]
    low_precision = q_btnh.dtype in (jnp.bfloat16, jnp.float16)
    platform = partition.platform()
    grid = isinstance(bias, GridBias)
    # A single query is a matrix-vector product: no score matrix to avoid.
    if t == 1 or platform == "cpu":
        return "blocks"
    if q_offset is not None:
        return "xla"
    width = h + bias.width if grid else h
    fits = width <= cudnn.MAX_WIDTH and t % 2 == s % 2 == 0  # odd lengths have no backward pass
    same_dtype = bias_bnts is None or bias_bnts.dtype == q_btnh.dtype
    if platform == "gpu" and low_precision and fits and same_dtype:
        return "cudnn"
    dense = bias_bnts is not None or mask_bts is not None or bias is not None and not grid
    if platform == "tpu" and not dense and t >= splash.LANES and s >= splash.LANES:
        return "splash"
    return "blocks" if grid else "xla"
