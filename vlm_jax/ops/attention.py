"""Softmax attention: the only one in the repository, with every implementation behind it.

Callers give the *structure* of the mask; the implementation decides whether it needs a dense one:

    xla      `jax.nn.dot_product_attention` with a dense mask; takes every call on every platform.
    blocks   CPU, and the steps of a decoding loop everywhere: our own products. Causal attention
             goes in query blocks that read only the keys at or before them, so half of the scores
             of a long sequence are never computed; a single query multiplies the cache in place.
    cudnn    GPU, bfloat16 or float16. Plain causal attention needs no mask at all; a dense mask
             would become an additive bias, so only segments and padding pay for one.
    splash   TPU, sequences and head widths padded to 128; causal and segment masks are built in.

Head widths that a kernel does not take (100 of LVM-3B) are padded with zeros, which is exact: zero
features add nothing to a score and give zero output features. The scale stays that of the true
width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vlm_jax.ops import masks, matmul, partition

_BLOCK = 256  # queries per block; ours: best of 128..1024 on CPU, 1,024 tokens
_MAX_BLOCKS = 16  # the blocks are unrolled; longer sequences use larger ones
_MASKED = -1e30  # finite, so that a fully masked (padding) row gives a mean rather than NaN
_CUDNN_MAX_WIDTH = 128
_LANES = 128  # TPU


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
      kv_valid_bs: bool, keys that are real. A row without any gets a mean, never NaN.
      prefix: the first so many keys are read by every query although `causal`: an image in front
        of text (`masks.prefix`).
      mask_bts: bool, any further restriction; dense for every implementation. b may be 1.
      bias_bnts: added to the scores; axes of size 1 broadcast.
      scale: factor on the scores; None is 1/sqrt(h). T5 passes 1.
      implementation: 'xla', 'blocks', 'cudnn', 'splash', or None for the best that takes this
        call.

    Returns:
      o_btnh.

    Raises:
      ValueError: heads that do not group, one of the two segment arrays missing, unknown name, a
        prefix together with a cache's offset.
    """
    n, h, k = q_btnh.shape[2], q_btnh.shape[3], k_bskh.shape[2]
    if n % k:
        raise ValueError(f"{n} query heads cannot share {k} key heads; n must be a multiple of k")
    if (q_segments_bt is None) != (kv_segments_bs is None):
        raise ValueError("give both q_segments_bt and kv_segments_bs, or neither")
    if prefix and q_offset is not None:
        raise ValueError("prefix is for queries that start at slot 0; q_offset was given as well")
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
    implementation = implementation or choose(q_btnh, k_bskh, bias_bnts=bias_bnts, **where)
    match implementation:
        case "xla":
            return _xla(q_btnh, k_bskh, v_bskh, bias_bnts, scale, **where)
        case "blocks":
            return _blocks(q_btnh, k_bskh, v_bskh, bias_bnts, scale, **where)
        case "cudnn":
            return _cudnn(q_btnh, k_bskh, v_bskh, bias_bnts, scale, **where)
        case "splash":
            segments = q_segments_bt, kv_segments_bs
            kind = _splash_mask(causal, where["prefix"])
            with matmul.precision_within(q_btnh, k_bskh, v_bskh):
                return _splash(q_btnh, k_bskh, v_bskh, scale, kind, segments, kv_valid_bs)
    known = "xla, blocks, cudnn, splash"
    raise ValueError(f"unknown attention implementation {implementation!r}; known: {known}")


def choose(q_btnh, k_bskh, *, q_offset=None, bias_bnts=None, mask_bts=None, **_) -> str:
    """The fastest implementation that takes these arguments on the platform of this trace."""
    (_, t, _, h), s = q_btnh.shape, k_bskh.shape[1]
    low_precision = q_btnh.dtype in (jnp.bfloat16, jnp.float16)
    platform = partition.platform()
    # A single query is a matrix-vector product: no score matrix to avoid.
    if t == 1 or platform == "cpu":
        return "blocks"
    if q_offset is not None:
        return "xla"
    fits = h <= _CUDNN_MAX_WIDTH and t % 2 == s % 2 == 0  # odd lengths have no backward pass
    same_dtype = bias_bnts is None or bias_bnts.dtype == q_btnh.dtype
    if platform == "gpu" and low_precision and fits and same_dtype:
        return "cudnn"
    dense = bias_bnts is not None or mask_bts is not None
    if platform == "tpu" and not dense and t >= _LANES and s >= _LANES:
        return "splash"
    return "xla"


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


def _xla(q_btnh, k_bskh, v_bskh, bias_bnts, scale, **where):
    mask_bts = dense_mask(q_btnh.shape[1], k_bskh.shape[1], **where)
    with matmul.precision_within(q_btnh, k_bskh, v_bskh):
        return jax.nn.dot_product_attention(
            q_btnh,
            k_bskh,
            v_bskh,
            bias=bias_bnts,
            mask=None if mask_bts is None else mask_bts[:, None],
            scale=scale,
            implementation="xla",
        )


def _blocks(q_btnh, k_bskh, v_bskh, bias_bnts, scale, **where):
    b, t, n, h = q_btnh.shape
    s, k = k_bskh.shape[1:3]
    if t == 1 and bias_bnts is None:
        return _one_query(q_btnh, k_bskh, v_bskh, scale, **where)
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
        allowed_bts = dense_mask(
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
            scores = jnp.where(allowed_bts[:, None, None], scores, _MASKED)
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


def _one_query(q_b1nh, k_bskh, v_bskh, scale, **where):
    """The step of a decoding loop. Axis z is batch and key heads in one, as in the cache.

    There the reshapes cancel those around the cache, so that XLA's CPU backend multiplies it in
    place: with two axes, or with the query first, it copies the whole cache at every step (at
    2,048 slots that took ten times as long as everything else).
    """
    (b, _, n, h), (s, k) = q_b1nh.shape, k_bskh.shape[1:3]
    k_zsh, v_zsh = (x.swapaxes(1, 2).reshape(b * k, s, h) for x in (k_bskh, v_bskh))
    q_zgh = (q_b1nh * scale).reshape(b * k, n // k, h)
    scores_zgs = matmul.einsum("zsh,zgh->zgs", k_zsh, q_zgh, preferred_element_type=jnp.float32)
    mask_bts = dense_mask(1, s, **where)
    if mask_bts is not None:
        mask_z1s = jnp.repeat(jnp.broadcast_to(mask_bts, (b, 1, s)), k, axis=0)
        scores_zgs = jnp.where(mask_z1s, scores_zgs, _MASKED)
    probs_zgs = jax.nn.softmax(scores_zgs, axis=-1).astype(v_bskh.dtype)
    return matmul.einsum("zgs,zsh->zgh", probs_zgs, v_zsh).reshape(b, 1, n, h)


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
      length: int32, slots in use; at least 1.
      prefix_valid_bs: bool, prefix keys that are real.
      scale: as in `attend`.

    Returns:
      o_brnh in v's dtype.
    """
    (b, r, n, h), (s, k) = q_brnh.shape, prefix_k_bskh.shape[1:3]
    g = n // k
    q_brnh = q_brnh * (h**-0.5 if scale is None else scale)
    # Axis z is batch and key heads in one, as in the cache; see _one_query.
    k_zsh, v_zsh = (x.swapaxes(1, 2).reshape(b * k, s, h) for x in (prefix_k_bskh, prefix_v_bskh))
    q_zqh = q_brnh.reshape(b, r, k, g, h).swapaxes(1, 2).reshape(b * k, r * g, h)
    scores_zqs = matmul.einsum("zqh,zsh->zqs", q_zqh, k_zsh, preferred_element_type=jnp.float32)
    if prefix_valid_bs is not None:
        valid_z1s = jnp.repeat(prefix_valid_bs, k, axis=0)[:, None]
        scores_zqs = jnp.where(valid_z1s, scores_zqs, _MASKED)
    top_zq = scores_zqs.max(axis=-1)
    weights_zqs = jnp.exp(scores_zqs - top_zq[..., None])
    o_zqh = matmul.einsum(
        "zqs,zsh->zqh", weights_zqs.astype(v_zsh.dtype), v_zsh, preferred_element_type=jnp.float32
    )
    branch = lambda x: x.reshape(b, k, r, g, *x.shape[2:]).swapaxes(1, 2)  # noqa: E731
    o_brkgh, top_brkg, mass_brkg = map(branch, (o_zqh, top_zq, weights_zqs.sum(axis=-1)))

    # Products, however small: XLA's CPU backend does not vectorise sums of products over one axis.
    f32 = dict(preferred_element_type=jnp.float32)
    q_brkgh = q_brnh.reshape(b, r, k, g, h)
    scores_brkgt = matmul.einsum("brkgh,brkth->brkgt", q_brkgh, own_k_brkth, **f32)
    used_t = jnp.arange(own_k_brkth.shape[3]) < length
    scores_brkgt = jnp.where(used_t, scores_brkgt, _MASKED)
    merged_brkg = jnp.maximum(top_brkg, scores_brkgt.max(axis=-1))
    weights_brkgt = jnp.exp(scores_brkgt - merged_brkg[..., None])
    own_brkgh = matmul.einsum(
        "brkgt,brkth->brkgh", weights_brkgt.astype(own_v_brkth.dtype), own_v_brkth, **f32
    )
    rescale_brkg = jnp.exp(top_brkg - merged_brkg)
    mass_brkg = mass_brkg * rescale_brkg + weights_brkgt.sum(axis=-1)
    o_brkgh = (o_brkgh * rescale_brkg[..., None] + own_brkgh) / mass_brkg[..., None]
    return o_brkgh.reshape(b, r, n, h).astype(own_v_brkth.dtype)


def _part(x_bs, part):
    return None if x_bs is None else x_bs[:, part]


def _cudnn(q_btnh, k_bskh, v_bskh, bias_bnts, scale, *, causal, **where):
    (_, t, _, h), s = q_btnh.shape, k_bskh.shape[1]
    if where["prefix"]:  # not the kernel's triangle any more
        where, causal = {**where, "causal": True}, False
    mask_bts = dense_mask(t, s, **where)  # None for plain causal or full attention
    # The kernel broadcasts over batch and heads alone.
    whole = lambda x: jnp.broadcast_to(x, (*x.shape[:2], t, s))  # noqa: E731
    o_btnh = jax.nn.dot_product_attention(
        *(_pad_axis(x, 3, 8) for x in (q_btnh, k_bskh, v_bskh)),
        bias=None if bias_bnts is None else whole(bias_bnts),
        mask=None if mask_bts is None else whole(mask_bts[:, None]),
        scale=scale,
        is_causal=causal,
        implementation="cudnn",
    )
    return o_btnh[..., :h]


def _splash_mask(causal, prefix):
    """shape -> mask. Blocks of it that are all zero are skipped, all one are not masked."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    if not prefix:
        return splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask

    def make(shape):
        open_ts = np.broadcast_to(np.arange(shape[1]) < prefix, shape)
        return splash_attention_mask.NumpyMask(open_ts | np.tri(*shape, dtype=bool))

    return make


def _splash(q_btnh, k_bskh, v_bskh, scale, kind, segments, kv_valid_bs):
    # Imported here: the kernels load only where they run.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    (b, t, n, h), s = q_btnh.shape, k_bskh.shape[1]
    k = k_bskh.shape[2]
    q, keys, values = (
        _pad_axis(_pad_axis(x, 3, _LANES), 1, _LANES).swapaxes(1, 2)
        for x in (q_btnh * scale, k_bskh, v_bskh)
    )
    # Padding rows and keys become a document of their own: number -1.
    q_ids, kv_ids = segments if segments[0] is not None else (jnp.ones((b, t)), jnp.ones((b, s)))
    if kv_valid_bs is not None:
        kv_ids = jnp.where(kv_valid_bs, kv_ids, -1)
    q_ids, kv_ids = (_pad_axis(x.astype(jnp.int32), 1, _LANES, fill=-1) for x in (q_ids, kv_ids))

    mesh = partition.active_mesh()
    shards = 1 if mesh is None else mesh.shape.get("tensor", 1)
    shards = shards if k % shards == 0 else 1
    shape = q.shape[2], keys.shape[2]
    mask = splash_attention_mask.MultiHeadMask([kind(shape) for _ in range(n // shards)])
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)

    def local(q_bnth, k_bksh, v_bksh, q_ids_bt, kv_ids_bs):
        group = q_bnth.shape[1] // k_bksh.shape[1]
        k_bnsh, v_bnsh = (jnp.repeat(x, group, axis=1) for x in (k_bksh, v_bksh))
        ids = splash_attention_kernel.SegmentIds(q_ids_bt, kv_ids_bs)
        return jax.vmap(kernel)(q_bnth, k_bnsh, v_bnsh, ids)

    if mesh is not None and mesh.size > 1:  # kernels are opaque to the partitioner
        rows = partition.spec((b,), (partition.BATCH,), mesh)[0]
        heads = "tensor" if shards > 1 else None
        full, ids = PartitionSpec(rows, heads), PartitionSpec(rows)
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(full, full, full, ids, ids),
            out_specs=full,
            check_vma=False,
        )
    o_bnth = local(q, keys, values, q_ids, kv_ids)
    return o_bnth.swapaxes(1, 2)[:, :t, :, :h].astype(v_bskh.dtype)


def _pad_axis(x, axis, multiple, fill=0):
    extra = -x.shape[axis] % multiple
    pad = [(0, extra if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pad, constant_values=fill) if extra else x
