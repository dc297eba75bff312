"""Two-dimensional convolution and group normalisation, channels last.

Everything here takes and returns [B, H, W, C]; kernels are [KH, KW, C_in, C_out] (HWIO).
Convolutions compute in the dtype of their input; normalisation statistics are always float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from vlm_jax.ops import matmul

_DIMS = ("NHWC", "HWIO", "NHWC")
SAME3 = ((1, 1), (1, 1))
# Ours: where `upsample_conv2d` starts to win on CPU (256 to 768 channels, batch 1).
_MIN_PIXELS_FOR_PHASES = 2048


def conv2d(x_byxc, kernel_yxcd, bias_d, *, stride=1, padding=SAME3):
    """Convolution plus bias, in the dtype of x.

    Args:
      x_byxc: float[B, H, W, C].
      kernel_yxcd: float[KH, KW, C, D].
      bias_d: float[D].
      stride: of both axes.
      padding: ((top, bottom), (left, right)) zeros.

    Returns:
      float[B, H', W', D].
    """
    kernel_yxcd = kernel_yxcd.astype(x_byxc.dtype)
    y_byxd = lax.conv_general_dilated(
        x_byxc,
        kernel_yxcd,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=_DIMS,
        precision=matmul.precision_of(x_byxc, kernel_yxcd),
    )
    return y_byxd + bias_d.astype(x_byxc.dtype)


def group_norm(x_byxc, scale_c, bias_c, *, groups, eps):
    """Group normalisation over space and the channels of a group, in float32.

    One pass over x: per-channel sums of x and x**2 (contiguous, so they vectorise), combined into
    groups afterwards, where the arrays are tiny. What remains is one multiply-add per value, which
    XLA fuses with the activation that follows.

    Args:
      x_byxc: float[B, H, W, C], C a multiple of groups.
      scale_c, bias_c: float[C].
      groups: number of groups.
      eps: added to the variance.

    Returns:
      float[B, H, W, C] in the dtype of x.
    """
    b, _, _, c = x_byxc.shape
    x32_byxc = x_byxc.astype(jnp.float32)

    def over_groups(v_bc):
        v_bgc = v_bc.reshape(b, groups, c // groups)
        return jnp.broadcast_to(v_bgc.mean(-1, keepdims=True), v_bgc.shape).reshape(b, c)

    mean_bc = over_groups(x32_byxc.mean((1, 2)))
    square_bc = over_groups(jnp.square(x32_byxc).mean((1, 2)))
    # E[x^2] - E[x]^2 can round below zero for a constant input.
    variance_bc = jnp.maximum(square_bc - jnp.square(mean_bc), 0.0)
    gain_bc = lax.rsqrt(variance_bc + eps) * scale_c.astype(jnp.float32)
    shift_bc = bias_c.astype(jnp.float32) - mean_bc * gain_bc
    y_byxc = x32_byxc * gain_bc[:, None, None, :] + shift_bc[:, None, None, :]
    return y_byxc.astype(x_byxc.dtype)


def upsample_nearest(x_byxc, factor=2):
    """[B, H, W, C] -> [B, factor*H, factor*W, C], every pixel repeated."""
    b, h, w, c = x_byxc.shape
    x_byixjc = jnp.broadcast_to(x_byxc[:, :, None, :, None], (b, h, factor, w, factor, c))
    return x_byixjc.reshape(b, h * factor, w * factor, c)


def upsample_conv2d(x_byxc, kernel_yxcd, bias_d):
    """Nearest-neighbour doubling followed by a padded 3x3 convolution, in 4/9 of the products.

    A 3x3 window on the doubled image covers only 2x2 different pixels. Along one axis:

        output 2i      reads  x[i-1] x[i] x[i]      with k0 k1 k2  =  x[i-1] x[i]  with k0, k1+k2
        output 2i+1    reads  x[i] x[i] x[i+1]                     =  x[i] x[i+1]  with k0+k1, k2

    so each of the four output phases is a 2x2 convolution of the small image. Equal up to the
    rounding of the kernel sums. Summing kernels costs a few passes over them, which only pays when
    there are many pixels; with few, the plain form is used.

    Args:
      x_byxc: float[B, H, W, C]. kernel_yxcd: float[3, 3, C, D]. bias_d: float[D].

    Returns:
      float[B, 2*H, 2*W, D].
    """
    b, h, w, _ = x_byxc.shape
    if b * h * w < _MIN_PIXELS_FOR_PHASES:
        return conv2d(upsample_nearest(x_byxc), kernel_yxcd, bias_d)
    to_phases_auy = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], kernel_yxcd.dtype)
    kernels = jnp.einsum(
        "auy,evx,yxcd->aeuvcd",
        to_phases_auy,
        to_phases_auy,
        kernel_yxcd,
        precision=lax.Precision.HIGHEST,
    )
    rows = []
    for a in range(2):
        phases_byxd = [
            conv2d(x_byxc, kernels[a, e], bias_d, padding=((1 - a, a), (1 - e, e)))
            for e in range(2)
        ]
        rows.append(jnp.stack(phases_byxd, axis=3))
    y_byaxed = jnp.stack(rows, axis=2)
    return y_byaxed.reshape(b, 2 * h, 2 * w, -1)


class Conv(nnx.Module):
    """A convolution with bias; see `conv2d`.

    Kernels start uniform with variance 1/fan_in. Ours: torch's default, which the reference keeps,
    has a third of that; a small tokenizer learned faster with more. Biases start at zero.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        width_in: int,
        width_out: int,
        size: int,
        *,
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
        param_dtype: str = "float32",
    ):
        init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        dtype = jnp.dtype(param_dtype)
        self.kernel = nnx.Param(init(rngs.params(), (size, size, width_in, width_out), dtype))
        self.bias = nnx.Param(jnp.zeros((width_out,), dtype))
        self.stride = stride
        self.padding = ((size // 2,) * 2,) * 2 if padding is None else padding

    def __call__(self, x_byxc):
        """float[B, H, W, C_in] -> float[B, H', W', C_out]."""
        return conv2d(
            x_byxc, self.kernel[...], self.bias[...], stride=self.stride, padding=self.padding
        )


class GroupNorm(nnx.Module):
    """Group normalisation with scale and bias; see `group_norm`."""

    def __init__(
        self,
        width: int,
        *,
        groups: int = 32,
        eps: float = 1e-6,
        param_dtype: str = "float32",
    ):
        dtype = jnp.dtype(param_dtype)
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))
        self.groups = groups
        self.eps = eps

    def __call__(self, x_byxc):
        """float[B, H, W, C] -> the same shape and dtype."""
        return group_norm(x_byxc, self.scale[...], self.bias[...], groups=self.groups, eps=self.eps)
