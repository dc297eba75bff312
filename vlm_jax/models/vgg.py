"""VGG16's convolutions, and LPIPS on them: how different two images look to a network.

Zhang et al. 2018, arXiv 1801.03924 (LPIPS v0.1); Simonyan and Zisserman 2014, arXiv 1409.1556.

    stage   convolutions   width   its last activation   side at 224 px
    1       2                 64   relu1_2               224
    2       2                128   relu2_2               112
    3       3                256   relu3_3                56
    4       3                512   relu4_3                28
    5       3                512   relu5_3                14

All 3x3 with one pixel of zeros around, each followed by a relu; 2x2 maximum between stages.
14,714,688 parameters, 1,735,488 of them in the first three stages, plus one weight per channel of
the activations above for LPIPS. Weights come from `weights.lpips`; random ones measure nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from vlm_jax.nn import conv, functional

# (convolutions, width) of every stage.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
LAYERS = tuple(f"relu{stage + 1}_{count}" for stage, (count, _) in enumerate(STAGES))

# Small and frozen: every device holds all of it.
SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(^|/)perceptual/vgg/conv/\d+/(kernel|bias)$", PartitionSpec()),
    (r"(^|/)perceptual/heads/\d+/weight$", PartitionSpec()),
)


@dataclasses.dataclass(frozen=True)
class LpipsConfig:
    """How much of the network is used.

    Attributes:
      stages: of VGG16, from the first; 5 is LPIPS, fewer are cheaper and another measure.
      dtype: of the convolutions; the distances are float32.
    """

    stages: int = 5
    dtype: str = "float32"

    def __post_init__(self):
        if not 1 <= self.stages <= len(STAGES):
            raise ValueError(f"stages={self.stages}: VGG16 has 1 to {len(STAGES)}")


class Vgg16(nnx.Module):
    """The first stages of VGG16."""

    def __init__(self, cfg: LpipsConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.conv = nnx.List([])
        width_in = 3
        for count, width in STAGES[: cfg.stages]:
            for _ in range(count):
                self.conv.append(conv.Conv(rngs, width_in, width, 3))
                width_in = width

    def __call__(self, image01_byxc):
        """float[B, H, W, 3] in [0, 1] -> the last activation of every stage, in cfg.dtype."""
        # upstream: lpips ScalingLayer, on pixels in [-1, 1]
        shift_c = jnp.array([-0.030, -0.088, -0.188], jnp.float32)
        scale_c = jnp.array([0.458, 0.448, 0.450], jnp.float32)
        x_byxc = (2.0 * image01_byxc.astype(jnp.float32) - 1.0 - shift_c) / scale_c
        x_byxc = x_byxc.astype(self.cfg.dtype)
        features, layers = [], iter(self.conv)
        for stage, (count, _) in enumerate(STAGES[: self.cfg.stages]):
            if stage:
                x_byxc = halve(x_byxc)
            for _ in range(count):
                x_byxc = jax.nn.relu(next(layers)(x_byxc))
            features.append(x_byxc)
        return features


class Head(nnx.Module):
    """One non-negative weight per channel."""

    def __init__(self, width: int):
        self.weight = nnx.Param(jnp.full((width,), 1.0 / width, jnp.float32))


class Lpips(nnx.Module):
    """The distance; `vgg` and `heads` may be used alone."""

    def __init__(self, cfg: LpipsConfig, rngs: nnx.Rngs):
        self.vgg = Vgg16(cfg, rngs)
        self.heads = nnx.List([Head(width) for _, width in STAGES[: cfg.stages]])

    def __call__(self, image01_byxc, other01_byxc):
        """Two float[B, H, W, 3] in [0, 1] -> float32[B]; 0 for equal images.

        At every stage features are scaled to length one per pixel; the squared differences,
        weighted by channel, are averaged over pixels; the stages are summed.
        """
        distance_b = jnp.zeros(image01_byxc.shape[0], jnp.float32)
        for head, a_byxc, b_byxc in zip(self.heads, self.vgg(image01_byxc), self.vgg(other01_byxc)):
            difference_byxc = jnp.square(_unit(a_byxc) - _unit(b_byxc))
            distance_b += jnp.einsum(
                "byxc,c->b", difference_byxc, head.weight[...], precision=lax.Precision.HIGHEST
            ) / (a_byxc.shape[1] * a_byxc.shape[2])
        return distance_b


def make(cfg: LpipsConfig) -> functional.Functional:
    """LPIPS behind the functional boundary: `.init(rng)`, `.abstract()`, `.bind(params)`."""
    return functional.Functional(lambda rngs: Lpips(cfg, rngs))


def _unit(x_byxc):
    x_byxc = x_byxc.astype(jnp.float32)
    square_byx1 = jnp.sum(jnp.square(x_byxc), axis=-1, keepdims=True)
    # The root has no derivative at 0, where all channels of a pixel are cut off by the relu.
    return x_byxc / (jnp.sqrt(jnp.maximum(square_byx1, 1e-20)) + 1e-10)


def halve(x_byxc):
    """The maximum of every 2x2 pixels."""
    # A Python number: given an array, jit does not see that this is a differentiable maximum.
    return lax.reduce_window(x_byxc, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
