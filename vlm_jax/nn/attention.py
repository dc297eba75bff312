"""Multi-head attention: projections around `ops.attention.attend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from vlm_jax.nn import linear, lora, norms
from vlm_jax.ops import attention, partition


class Attention(nnx.Module):
    """q, k, v and o of multi-head attention, to oneself or to another sequence.

    The pieces are public, since a cache stands between them: `queries`, `keys_values`, `merge`.

    Args:
      rngs: of the start values, drawn for q, k, v, o.
      width: of input and output.
      num_heads: of queries. kv_heads: of keys and values, 0 is as many.
      head_width: 0 is width // num_heads.
      kv_width: of the sequence that is read; 0 is `width`.
      bias: letters of q, k, v, o that have one.
      qk_norm_eps: queries and keys are RMS-normalised over a head, before they are rotated
        (Henry et al., arXiv 2010.04245); None is not.
      score_scale: as `scale` of `attend`: None is 1/sqrt(head_width), T5 has 1.
      stack, scale, param_dtype: as in `linear.Linear`; out_scale: of o, None is `scale`.
      lora: which matrices have an addition.

    Raises:
      ValueError: a width that the heads do not divide.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        num_heads: int,
        *,
        kv_heads: int = 0,
        head_width: int = 0,
        kv_width: int = 0,
        bias: str = "",
        qk_norm_eps: float | None = None,
        score_scale: float | None = None,
        stack: tuple[int, ...] = (),
        scale: float = 0.02,
        out_scale: float | None = None,
        param_dtype: str = "float32",
        lora: lora.Lora = lora.NONE,
    ):
        if not head_width and width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        head_width = head_width or width // num_heads
        kv_heads, kv_width = kv_heads or num_heads, kv_width or width
        self.score_scale = score_scale

        def make(name, sizes, inputs, scale):
            fields = dict(stack=stack, scale=scale, param_dtype=param_dtype, inputs=inputs)
            sizes_of_bias = sizes[inputs:] if name in bias else ()
            return linear.Linear(rngs, sizes, sizes_of_bias, **fields, **lora.of(name))

        self.q = make("q", (width, num_heads, head_width), 1, scale)
        self.k = make("k", (kv_width, kv_heads, head_width), 1, scale)
        self.v = make("v", (kv_width, kv_heads, head_width), 1, scale)
        out_scale = scale if out_scale is None else out_scale
        self.o = make("o", (num_heads, head_width, width), 2, out_scale)
        normed, norm = qk_norm_eps is not None, (head_width, qk_norm_eps, param_dtype, stack)
        self.q_norm = norms.RMSNorm(*norm) if normed else None
        self.k_norm = norms.RMSNorm(*norm) if normed else None

    def __call__(self, x_btd, keys_bsd=None, values_bsd=None, *, rotate=None, **where):
        """x_btd -> x_btd.

        Args:
          x_btd: what queries are made of.
          keys_bsd, values_bsd: what keys and values are made of; None is x, and the keys.
          rotate: rotary positions: a function of q_btnh and of k_bskh.
          **where: of `ops.attention.attend`: masks, a bias.
        """
        keys_bsd = x_btd if keys_bsd is None else keys_bsd
        q_btnh = self.queries(x_btd, rotate)
        k_bskh, v_bskh = self.keys_values(keys_bsd, values_bsd, rotate)
        return self.merge(attention.attend(q_btnh, k_bskh, v_bskh, scale=self.score_scale, **where))

    def step(self, x_btd, attend: Callable[..., tuple[jax.Array, Any]], *, rotate=None, **where):
        """(x_btd, state) of self-attention through a cache.

        Args:
          x_btd: the new tokens.
          attend: (q_btnh, k_btkh, v_btkh, **where) -> (o_btnh, state): `attend` of a
            `models.caches.Call`.
          rotate, **where: as in a call without one.
        """
        q_btnh, (k_btkh, v_btkh) = (
            self.queries(x_btd, rotate),
            self.keys_values(x_btd, None, rotate),
        )
        if self.score_scale is not None:
            where = dict(scale=self.score_scale, **where)
        o_btnh, state = attend(q_btnh, k_btkh, v_btkh, **where)
        return self.merge(o_btnh), state

    def queries(self, x_btd, rotate=None):
        """q_btnh."""
        return _finish(self.q("btd,dnh->btnh", x_btd), self.q_norm, rotate)

    def keys_values(self, keys_bsd, values_bsd=None, rotate=None):
        """(k_bskh, v_bskh)."""
        k_bskh = _finish(self.k("btd,dnh->btnh", keys_bsd), self.k_norm, rotate)
        values_bsd = keys_bsd if values_bsd is None else values_bsd
        return k_bskh, _finish(self.v("btd,dnh->btnh", values_bsd))

    def merge(self, o_btnh):
        """x_btd of what the heads read."""
        return self.o("btnh,nhd->btd", o_btnh)


def _finish(x_btnh, norm=None, rotate=None):
    x_btnh = partition.constrain(x_btnh, partition.BATCH, None, "tensor", None)
    x_btnh = x_btnh if norm is None else norm(x_btnh)
    return x_btnh if rotate is None else rotate(x_btnh)
