"""Matrices with biases and activations between them: small heads, projectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.nn import activations, linear


class Perceptron(nnx.Module):
    """Matrices with biases and an activation between them.

    Args:
      rngs: of the start values.
      sizes: of input, hidden layers and output.
      activation: a name of `activations`.
      torch_start: kernels and biases uniform within 1 / sqrt(fan in), torch's default. Else kernels
        are normal with deviation 0.02 and biases zero.
      dtype: compute. param_dtype: storage.

    Raises:
      ValueError: no such activation.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        sizes: tuple[int, ...],
        activation: str,
        *,
        torch_start: bool = False,
        dtype: str = "float32",
        param_dtype: str = "float32",
    ):
        activations.check(activation)
        self.activation = activation
        self.dtype = dtype
        pairs = zip(sizes, sizes[1:])
        self.layers = nnx.List(
            [linear.Linear(rngs, pair, pair[1:], param_dtype=param_dtype) for pair in pairs]
        )
        for layer in self.layers if torch_start else ():
            bound = layer.kernel.shape[0] ** -0.5
            for variable in (layer.kernel, layer.bias):
                shape = variable.shape
                drawn = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
                variable[...] = drawn.astype(param_dtype)

    def __call__(self, x):
        """[..., sizes[0]] -> [..., sizes[-1]], in the compute dtype."""
        activate = activations.BY_NAME[self.activation]
        axes, x = "abc"[: x.ndim - 1], x.astype(self.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(f"{axes}d,df->{axes}f", activate(x) if i else x)
        return x
