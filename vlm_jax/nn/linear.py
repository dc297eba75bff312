"""A matrix, with a bias and a low-rank addition where they are wanted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.ops import matmul


class Linear(nnx.Module):
    """`self.up("btd,df->btf", x_btd)`: an einsum with the kernel, plus a bias over its new axes.

    With LoRA (Hu et al., arXiv 2106.09685) the kernel is kernel + lora_scale * A B, which is never
    made: x goes through A and B beside it. B starts at zero, so the start is that of the kernel
    alone. `nn.lora` adds the product to the kernel and takes it away again; the optimizer trains
    nothing else with `trainable="lora_[ab]$"`.

    Args:
      rngs: of the start values: normal with deviation `scale`, biases zero. With LoRA no further
        key is drawn, so that a network starts from the same kernels with it and without.
      sizes: of the kernel; the axes of the input first.
      bias: sizes of the bias: the kernel's axes that are in the result; () is no bias.
      stack: leading axes of all, for layers that are scanned.
      inputs: number of leading axes of `sizes` that are the input's; matters to LoRA alone.
      lora_rank: 0 is none. lora_scale: factor on the product; alpha / rank.
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
        inputs: int = 1,
        lora_rank: int = 0,
        lora_scale: float = 1.0,
    ):
        key = rngs.params()
        self.kernel = nnx.Param(scale * jax.random.normal(key, (*stack, *sizes), param_dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, *bias), param_dtype)) if bias else None
        self.lora_scale = lora_scale
        self.lora_a = self.lora_b = None
        if lora_rank:
            into = (*stack, *sizes[:inputs], lora_rank)
            out_of = (*stack, lora_rank, *sizes[inputs:])
            drawn = jax.random.normal(jax.random.fold_in(key, 1), into, param_dtype)
            self.lora_a = nnx.data(nnx.Param(scale * drawn))
            self.lora_b = nnx.data(nnx.Param(jnp.zeros(out_of, param_dtype)))

    def __call__(self, spec: str, x: jax.Array) -> jax.Array:
        """The product in x's dtype."""
        y = matmul.project(spec, x, self.kernel[...].astype(x.dtype))
        if self.lora_a is not None:
            a, b = (p[...].astype(x.dtype) for p in (self.lora_a, self.lora_b))
            into, out_of = _through_rank(spec)
            low = matmul.project(into, x, a)
            y = y + self.lora_scale * matmul.project(out_of, low, b)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _through_rank(spec):
    """'btd,dnh->btnh' -> ('btd,dr->btr', 'btr,rnh->btnh')."""
    operands, result = spec.split("->")
    x_axes, w_axes = operands.split(",")
    rank = next(letter for letter in "rzyxw" if letter not in spec)
    inputs = "".join(axis for axis in w_axes if axis not in result)
    outputs = "".join(axis for axis in w_axes if axis in result)
    low = "".join(axis for axis in x_axes if axis not in inputs) + rank
    return f"{x_axes},{inputs}{rank}->{low}", f"{low},{rank}{outputs}->{result}"
