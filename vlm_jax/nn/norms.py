"""Normalisation layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale; statistics in float32, product in x's dtype.

    Args:
      width: size of the last axis.
      eps: added to the mean square.
      param_dtype: dtype of the stored scale.
      stack: leading axes of the scale, for layers that are scanned.
    """

    def __init__(self, width: int, eps: float, param_dtype="float32", stack: tuple[int, ...] = ()):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((*stack, width), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias, all in float32, returned in x's dtype.

    Args:
      width: size of the last axis.
      eps: added to the variance.
      param_dtype: dtype of the stored scale and bias.
    """

    def __init__(self, width: int, eps: float = 1e-5, param_dtype="float32"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype)
