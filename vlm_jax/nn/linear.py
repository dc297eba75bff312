"""A matrix with a bias, for the networks that have both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.ops import matmul


class Linear(nnx.Module):
    """`self.up("btd,df->btf", x_btd)`: an einsum with the kernel, plus a bias over its new axes.

    Args:
      rngs: of the start values: normal with deviation `scale`, biases zero.
      sizes: of the kernel.
      bias: sizes of the bias: the kernel's axes that are in the result; () is no bias.
      stack: leading axes of both, for layers that are scanned.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        sizes: tuple[int, ...],
        bias: tuple[int, ...] = (),
        *,
        stack: tuple[int, ...] = (),
        scale: float = 0.02,
        param_dtype: str = "float32",
    ):
        sizes = (*stack, *sizes)
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), sizes, param_dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, *bias), param_dtype)) if bias else None

    def __call__(self, spec: str, x: jax.Array) -> jax.Array:
        """The product in x's dtype."""
        y = matmul.project(spec, x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
