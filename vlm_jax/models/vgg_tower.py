"""VGG16 as an image tower: for small machines, where no CLIP weights are at hand.

    image ─ VGG16, frozen ─ 2x2 maximum ─ post_norm ─ tokens, and their mean in front

Takes the place of `clip.VisionTower`: pixels normalised as CLIP's, a summary token first, then one
token per place in raster order. At 64 pixels and four stages: 16 tokens of 512 numbers.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from vlm_jax.models import clip, vgg
from vlm_jax.nn import norms

SHARDING_RULES = (
    (r"^vgg/conv/\d+/(kernel|bias)$", PartitionSpec()),
    (r"^post_norm/(scale|bias)$", PartitionSpec()),
)


@dataclasses.dataclass(frozen=True)
class VggTowerConfig:
    """Sizes of the tower.

    Attributes:
      image_size: side in pixels; a multiple of the downsampling, 2 to the number of stages.
      stages: of VGG16, from the first.
      dtype: compute. param_dtype: storage of the norm.
    """

    image_size: int = 64
    stages: int = 4
    dtype: str = "float32"
    param_dtype: str = "float32"

    projection = 0

    def __post_init__(self):
        vgg.LpipsConfig(self.stages)
        if self.image_size % 2**self.stages:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of {2**self.stages}, the "
                f"downsampling of {self.stages} stages"
            )

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return vgg.STAGES[self.stages - 1][1]

    @property
    def num_patches(self) -> int:
        """Tokens of an image without the summary."""
        return (self.image_size // 2**self.stages) ** 2

    @property
    def training_flops(self) -> float:
        """Of an image: the forward pass, for there is no other."""
        total, side, width_in = 0.0, self.image_size, 3
        for count, width in vgg.STAGES[: self.stages]:
            total += 18.0 * side**2 * width * (width_in + (count - 1) * width)
            side, width_in = side // 2, width
        return total


PRESETS = {"vgg16": VggTowerConfig()}


class VggTower(nnx.Module):
    """See the module."""

    def __init__(self, cfg: VggTowerConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.vgg = vgg.Vgg16(vgg.LpipsConfig(cfg.stages, cfg.dtype), rngs)
        self.post_norm = norms.LayerNorm(cfg.width, param_dtype=cfg.param_dtype)

    def tokens(self, image_byxc):
        """float[B, S, S, 3], normalised as CLIP's -> x_btc, t = 1 + num_patches."""
        image01_byxc = image_byxc * jnp.array(clip.STD) + jnp.array(clip.MEAN)
        x_byxc = vgg.halve(self.vgg(image01_byxc)[-1])
        x_bpc = x_byxc.reshape(x_byxc.shape[0], -1, self.cfg.width)
        x_btc = jnp.concatenate([x_bpc.mean(axis=1, keepdims=True), x_bpc], axis=1)
        return self.post_norm(x_btc)
