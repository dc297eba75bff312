"""`jax.nn.dot_product_attention` with a dense mask."""

from __future__ import annotations

import jax

from vlm_jax.ops import matmul
from vlm_jax.ops.attention import structure


def attend(q_btnh, k_bskh, v_bskh, bias, scale, **where):
    """See the package."""
    mask_bts = structure.dense_mask(q_btnh.shape[1], k_bskh.shape[1], **where)
    with matmul.precision_within(q_btnh, k_bskh, v_bskh):
        return jax.nn.dot_product_attention(
            q_btnh,
            k_bskh,
            v_bskh,
            bias=None if bias is None else bias.whole(),
            mask=None if mask_bts is None else mask_bts[:, None],
            scale=scale,
            implementation="xla",
        )
