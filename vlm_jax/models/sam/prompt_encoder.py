"""SAM's prompt encoder: boxes, points and masks as tokens and maps.

A place in the image is 2 pi (2 c - 1) G with c in 0..1, x before y, and a matrix G of random
numbers that training never changes; then its sines, then its cosines. To it comes a vector that
says what is there: a corner of a box, a point inside or outside of the object.
Kirillov et al., arXiv 2304.02643, app. A.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.models.sam.config import SamConfig
from vlm_jax.nn import norms, patches
from vlm_jax.ops import matmul

# Rows of `kinds`.
OUTSIDE, INSIDE, LOW_CORNER, HIGH_CORNER = range(4)


class PromptEncoder(nnx.Module):
    """All of it in float32: places need more than 8 bits."""

    def __init__(self, cfg: SamConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        d, dtype = cfg.prompt_width, cfg.param_dtype

        def normal(*sizes):
            return nnx.Param(jax.random.normal(rngs.params(), sizes, dtype))

        self.gaussian = normal(2, d // 2)
        self.kinds = normal(4, d)
        self.not_a_point = normal(d)
        self.no_mask = normal(d)
        self.mask = MaskReader(cfg, rngs)

    def places(self, places_x):
        """float32[..., 2] in pixels, (x, y) -> [..., D]."""
        unit_x = 2 * places_x.astype(jnp.float32) / self.cfg.image_size - 1
        flat_px = unit_x.reshape(-1, 2)
        gaussian = self.gaussian[...].astype(jnp.float32)
        angles_pd = 2 * jnp.pi * matmul.einsum("px,xd->pd", flat_px, gaussian)
        code_pd = jnp.concatenate([jnp.sin(angles_pd), jnp.cos(angles_pd)], axis=-1)
        return code_pd.reshape(*places_x.shape[:-1], -1)

    def grid(self):
        """The code of every patch's centre, [Y, X, D]."""
        centres = (jnp.arange(self.cfg.grid) + 0.5) * self.cfg.patch_size
        return self.places(jnp.stack(jnp.meshgrid(centres, centres), axis=-1))

    def boxes(self, boxes_bkx):
        """float32[B, K, 4] in pixels, (x0, y0, x1, y1) -> two tokens each, [B, K, 2, D].

        Boxes may leave the image.
        """
        corners = boxes_bkx.reshape(*boxes_bkx.shape[:-1], 2, 2)
        return self.places(corners + 0.5) + self.kinds[...][LOW_CORNER:].astype(jnp.float32)

    def points(self, points_bkpx, kinds_bkp):
        """Points in pixels -> a token each, [B, K, P, D].

        Args:
          points_bkpx: float32[B, K, P, 2], (x, y).
          kinds_bkp: int32: INSIDE the object, OUTSIDE of it, -1: there is no point. Upstream puts
            one that is none behind the points of a prompt without a box.
        """
        code = self.places(points_bkpx + 0.5)
        there = (kinds_bkp >= 0)[..., None]
        kinds = jnp.take(self.kinds[...].astype(jnp.float32), jnp.maximum(kinds_bkp, 0), axis=0)
        return jnp.where(there, code + kinds, self.not_a_point[...].astype(jnp.float32))

    def masks(self, logits_bkyx):
        """Masks of `cfg.low_res` as prompts -> maps [B, K, Y, X, D]; without one, `no_mask`."""
        return self.mask(logits_bkyx)


class MaskReader(nnx.Module):
    """Three convolutions, a quarter of the side."""

    def __init__(self, cfg, rngs):
        c, d, dtype = cfg.mask_channels, cfg.prompt_width, cfg.param_dtype
        sizes = ((2, 1, c // 4), (2, c // 4, c), (1, c, d))
        fields = dict(bias=True, param_dtype=dtype)
        self.convs = nnx.List(
            [patches.PatchEmbed(rngs, s, out, channels=n, **fields) for s, n, out in sizes]
        )
        self.norms = nnx.List([norms.LayerNorm(n, cfg.norm_eps, dtype) for n in (c // 4, c)])

    def __call__(self, logits_bkyx):
        """float[B, K, 4 Y, 4 X] -> [B, K, Y, X, D]."""
        b, k, y, x = logits_bkyx.shape
        maps = logits_bkyx.reshape(b * k, y, x, 1).astype(jnp.float32)
        for convolution, norm in zip(self.convs, self.norms):
            maps = jax.nn.gelu(norm(convolution(maps)), approximate=False)
        maps = self.convs[2](maps)
        return maps.reshape(b, k, *maps.shape[1:])
