"""cuDNN's kernel, by `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.ops.attention import structure

MAX_WIDTH = 128  # of a head


def attend(q_btnh, k_bskh, v_bskh, bias_bnts, scale, *, causal, **where):
    """See the package."""
    (_, t, _, h), s = q_btnh.shape, k_bskh.shape[1]
    if where["prefix"]:  # not the kernel's triangle any more
        where, causal = {**where, "causal": True}, False
    mask_bts = structure.dense_mask(t, s, **where)  # None for plain causal or full attention
    # The kernel broadcasts over batch and heads alone.
    whole = lambda x: jnp.broadcast_to(x, (*x.shape[:2], t, s))  # noqa: E731
    o_btnh = jax.nn.dot_product_attention(
        *(structure.pad_axis(x, 3, 8) for x in (q_btnh, k_bskh, v_bskh)),
        bias=None if bias_bnts is None else whole(bias_bnts),
        mask=None if mask_bts is None else whole(mask_bts[:, None]),
        scale=scale,
        is_causal=causal,
        implementation="cudnn",
    )
    return o_btnh[..., :h]
