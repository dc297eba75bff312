"""Products, of activations with weights above all; of float32 in all of its bits.

Left to themselves, GPUs and TPUs round the factors of float32 products to 10 or 7 bits of fraction,
which is enough to change ids and labels of released weights. So a network of dtype "float32" asks
for whole products everywhere; one of "bfloat16" is not touched. jax's own setting goes before:
JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32 (or any other value) has the last word.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(*operands: jax.Array) -> lax.Precision | None:
    """For products of these: the highest if all are float32 and nobody has set jax's own."""
    whole = all(x.dtype == jnp.float32 for x in operands)
    return lax.Precision.HIGHEST if whole and _unset() else None


def precision_within(*operands: jax.Array) -> contextlib.AbstractContextManager:
    """`precision_of` for all products that are traced within, where there is no argument for it."""
    if precision_of(*operands) is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def _unset() -> bool:
    return jax.config.jax_default_matmul_precision is None


def einsum(spec: str, *operands: jax.Array, **fields) -> jax.Array:
    """`jnp.einsum` with `precision_of` its operands."""
    return jnp.einsum(spec, *operands, precision=precision_of(*operands), **fields)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`einsum(spec, x, w)` with a cheaper gradient for w on CPU.

    Automatic differentiation multiplies (gradient, x) and transposes the product; XLA's CPU backend
    then writes a transposed copy of the larger factor first. Asking for the product in the order
    of w's own axes avoids that, and leaves other backends as they were.

    Args:
      spec: such as "btd,df->btf"; every axis of an operand is in the other or in the result.
      x: activations.
      w: weight, in x's dtype.

    Returns:
      The product, in x's dtype.
    """
    return einsum(spec, x, w)


def _forward(spec, x, w):
    return einsum(spec, x, w), (x, w)


def _backward(spec, saved, gradient):
    x, w = saved
    operands, result = spec.split("->")
    x_axes, w_axes = operands.split(",")
    return (
        einsum(f"{result},{w_axes}->{x_axes}", gradient, w),
        einsum(f"{x_axes},{result}->{w_axes}", x, gradient),
    )


project.defvjp(_forward, _backward)
