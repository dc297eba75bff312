"""The TPU kernel of Pallas, with causal and segment masks built in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vlm_jax.ops import matmul, partition
from vlm_jax.ops.attention import structure

LANES = 128
_NOBODY = -(2**31)  # the document of padding and of keys that are not valid


def attend(q_btnh, k_bskh, v_bskh, bias, scale, **where):
    """See the package."""
    h, true_v_bskh = v_bskh.shape[3], v_bskh
    if bias is not None:
        q_btnh, k_bskh, v_bskh = bias.fold(q_btnh, k_bskh, v_bskh, scale)
    kind = _kind(where["causal"], where["prefix"])
    segments = where["q_segments_bt"], where["kv_segments_bs"]
    with matmul.precision_within(q_btnh, k_bskh, v_bskh):
        o_btnh = _run(q_btnh, k_bskh, v_bskh, scale, kind, segments, where["kv_valid_bs"])
    return structure.fill_empty(o_btnh[..., :h], true_v_bskh, **where)


def _kind(causal, prefix):
    """shape -> mask. Blocks of it that are all zero are skipped, all one are not masked."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    if not prefix:
        return splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask

    def make(shape):
        open_ts = np.broadcast_to(np.arange(shape[1]) < prefix, shape)
        return splash_attention_mask.NumpyMask(open_ts | np.tri(*shape, dtype=bool))

    return make


def _run(q_btnh, k_bskh, v_bskh, scale, kind, segments, kv_valid_bs):
    # Imported here: the kernels load only where they run.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    (b, t, n, h), s = q_btnh.shape, k_bskh.shape[1]
    k = k_bskh.shape[2]
    q, keys, values = (
        structure.pad_axis(structure.pad_axis(x, 3, LANES), 1, LANES).swapaxes(1, 2)
        for x in (q_btnh * scale, k_bskh, v_bskh)
    )
    q_ids, kv_ids = segments if segments[0] is not None else (jnp.ones((b, t)), jnp.ones((b, s)))
    if kv_valid_bs is not None:
        kv_ids = jnp.where(kv_valid_bs, kv_ids, _NOBODY)
    q_ids, kv_ids = (
        structure.pad_axis(x.astype(jnp.int32), 1, LANES, fill=_NOBODY) for x in (q_ids, kv_ids)
    )

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
