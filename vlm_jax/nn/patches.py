"""Images as tokens: patches, and learned positions on a grid of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.nn import conv


class PatchEmbed(nnx.Module):
    """Every patch as one vector: a convolution whose stride is its size.

    Pixels behind the last whole patch are not read.

    Args:
      rngs: of the start values.
      size: side of a patch in pixels.
      width: of the vectors.
      bias: has one, zero at the start.
      channels: of the image.
      scale: deviation of the kernel; None is 1/sqrt(fan in).
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        size: int,
        width: int,
        *,
        bias: bool = False,
        channels: int = 3,
        scale: float | None = None,
        param_dtype: str = "float32",
    ):
        sizes = (size, size, channels, width)
        scale = (channels * size * size) ** -0.5 if scale is None else scale
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), sizes, param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype)) if bias else None

    def __call__(self, image_byxc):
        """float[B, H, W, C] -> x_byxd [B, H // size, W // size, width], in its dtype."""
        size = self.kernel.shape[0]
        bias = jnp.zeros((), image_byxc.dtype) if self.bias is None else self.bias[...]
        no_padding = ((0, 0), (0, 0))
        return conv.conv2d(image_byxc, self.kernel[...], bias, stride=size, padding=no_padding)


def resize_positions(
    table_td: jax.Array,
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    leading: int = 0,
    method: str = "bicubic",
    antialias: bool = True,
) -> jax.Array:
    """A table of learned positions for a grid of another size.

    Args:
      table_td: float[leading + old rows * old columns, D], row after row.
      old, new: (rows, columns).
      leading: first entries that are on no grid (a class token); they stay.
      method, antialias: as in `jax.image.resize`, whose bicubic kernel has a = -0.5; torch's has
        -0.75 and is not the same.

    Returns:
      float[leading + new rows * new columns, D], made in float32, in the table's dtype.

    Raises:
      ValueError: the table is not of the old size.
    """
    length, width = table_td.shape
    if length != leading + old[0] * old[1]:
        raise ValueError(
            f"{length} positions are not {leading} and a grid of {old[0]} x {old[1]} places"
        )
    if tuple(old) == tuple(new):
        return table_td
    grid_yxd = table_td[leading:].reshape(*old, width).astype(jnp.float32)
    resized_yxd = jax.image.resize(grid_yxd, (*new, width), method, antialias=antialias)
    resized_td = resized_yxd.reshape(-1, width).astype(table_td.dtype)
    return jnp.concatenate([table_td[:leading], resized_td])
