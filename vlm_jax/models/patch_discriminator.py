"""PatchGAN: says for every patch of an image whether it is a photo or a reconstruction.

Isola et al. 2016, arXiv 1611.07004, sec. 3.2.2; the sizes are those of taming-transformers.

    image ─ conv 4x4 /2 ─ lrelu ─ [conv 4x4 /2 ─ norm ─ lrelu] x (layers - 1)
          ─ conv 4x4 ─ norm ─ lrelu ─ conv 4x4 ─ logits          side/2**layers - 2 along an axis

Widths double from `width` to at most 8 times it. With three layers a logit sees 70x70 pixels; the
network of width 64 has 2,766,529 parameters. Positive logits mean "photo".

The reference normalises over the batch. Here it is over the groups of one image: no statistics
cross devices or accumulation parts, and a row does not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from vlm_jax.nn import conv, functional

LOSSES = ("hinge", "non_saturating")

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(^|/)discriminator/logits/kernel$", PartitionSpec()),  # one channel
    (r"(^|/)discriminator/conv/\d+/kernel$", PartitionSpec(None, None, None, "fsdp")),
    (r"(^|/)discriminator/norm/\d+/scale$", PartitionSpec()),
    (r"(^|/)discriminator/(conv/\d+|norm/\d+|logits)/bias$", PartitionSpec()),
)


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the network.

    Attributes:
      width: channels after the first convolution.
      num_layers: convolutions with stride 2.
      norm_groups: groups of the norms; 0 leaves them out.
      dtype: of the convolutions.
    """

    width: int = 64
    num_layers: int = 3
    norm_groups: int = 32
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_layers < 1 or self.width < 1:
            raise ValueError(f"width={self.width}, num_layers={self.num_layers}: both at least 1")
        if self.norm_groups and self.width % self.norm_groups:
            raise ValueError(
                f"width={self.width} is not a multiple of norm_groups={self.norm_groups}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after every convolution but the last."""
        return tuple(self.width * min(2**i, 8) for i in range(self.num_layers + 1))

    @property
    def min_side(self) -> int:
        """Smallest side in pixels of an image that gives a logit."""
        return 3 * 2**self.num_layers


class PatchDiscriminator(nnx.Module):
    """See the module."""

    def __init__(self, cfg: DiscriminatorConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        around = ((1, 1), (1, 1))
        self.conv = nnx.List([])
        self.norm = nnx.List([])
        width_in = 3
        for i, width in enumerate(cfg.widths):
            stride = 2 if i < cfg.num_layers else 1
            self.conv.append(conv.Conv(rngs, width_in, width, 4, stride=stride, padding=around))
            if i and cfg.norm_groups:
                self.norm.append(conv.GroupNorm(width, groups=cfg.norm_groups))
            width_in = width
        self.logits = conv.Conv(rngs, width_in, 1, 4, padding=around)

    def __call__(self, image01_byxc):
        """float[B, H, W, 3] around [0, 1] -> logits float32[B, h, w]."""
        x_byxc = (2.0 * image01_byxc - 1.0).astype(self.cfg.dtype)
        for i, layer in enumerate(self.conv):
            x_byxc = layer(x_byxc)
            if i and self.cfg.norm_groups:
                x_byxc = self.norm[i - 1](x_byxc)
            x_byxc = jax.nn.leaky_relu(x_byxc, 0.2)
        return self.logits(x_byxc)[..., 0].astype(jnp.float32)


def make(cfg: DiscriminatorConfig) -> functional.Functional:
    """The network behind the functional boundary: `.init(rng)`, `.abstract()`, `.bind(params)`."""
    return functional.Functional(lambda rngs: PatchDiscriminator(cfg, rngs))


def generator_loss_b(fake_byx, kind: str):
    """What the decoder pays for being recognised, float32[B].

    "hinge": -logit, which goes on pulling however sure the discriminator is (taming-transformers);
    "non_saturating": log(1 + exp(-logit)) (Goodfellow et al. 2014, sec. 3; MaskGIT).
    """
    loss_byx = -fake_byx if kind == "hinge" else jax.nn.softplus(-fake_byx)
    return loss_byx.mean((1, 2))


def discriminator_loss_b(real_byx, fake_byx, kind: str):
    """What the discriminator pays, float32[B].

    "hinge": (max(0, 1 - real) + max(0, 1 + fake)) / 2; "non_saturating": cross-entropy of both.
    """
    if kind == "hinge":
        loss_byx = 0.5 * (jax.nn.relu(1.0 - real_byx) + jax.nn.relu(1.0 + fake_byx))
    else:
        loss_byx = jax.nn.softplus(-real_byx) + jax.nn.softplus(fake_byx)
    return loss_byx.mean((1, 2))


def gradient_penalty_b(discriminate, image01_byxc):
    """R1: the squared length of the gradient of an image's mean logit, halved, float32[B].

    Mescheder et al. 2018, arXiv 1801.04406, eq. 9 with weight 1.
    """
    gradient_byxc = jax.grad(lambda x: discriminate(x).mean((1, 2)).sum())(image01_byxc)
    return 0.5 * jnp.square(gradient_byxc).sum((1, 2, 3))
