"""cuDNN's kernel, by `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.ops.attention import structure
from vlm_jax.ops.attention.bias import GridBias

MAX_WIDTH = 128  # of a head


def attend(q_btnh, k_bskh, v_bskh, bias, scale, **where):
    """See the package."""
    (_, t, _, h), s = q_btnh.shape, k_bskh.shape[1]
    values = v_bskh
    if isinstance(bias, GridBias):
        q_btnh, k_bskh, values = bias.fold(q_btnh, k_bskh, v_bskh, scale)
        bias = None
    # With a prefix it is not the kernel's triangle any more.
    triangle = where["causal"] and not where["prefix"]
    # None for plain causal or full attention.
    mask_bts = structure.dense_mask(t, s, **{**where, "causal": where["causal"] and not triangle})
    # The kernel broadcasts over batch and heads alone.

    def whole(x):
        return jnp.broadcast_to(x, (*x.shape[:2], t, s))

    o_btnh = jax.nn.dot_product_attention(
        *(structure.pad_axis(x, 3, 8) for x in (q_btnh, k_bskh, values)),
        bias=None if bias is None else whole(bias.whole().astype(q_btnh.dtype)),
        mask=None if mask_bts is None else whole(mask_bts[:, None]),
        scale=scale,
        is_causal=triangle,
        implementation="cudnn",
    )
    # Its own result would be the mean up to the diagonal.
    return structure.fill_empty(o_btnh[..., :h], v_bskh, **where)
