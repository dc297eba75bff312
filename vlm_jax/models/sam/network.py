"""The three parts of SAM together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlm_jax.models.sam.config import MEAN, STD, SamConfig
from vlm_jax.models.sam.image_encoder import ImageEncoder
from vlm_jax.models.sam.mask_decoder import MaskDecoder
from vlm_jax.models.sam.prompt_encoder import PromptEncoder
from vlm_jax.nn import functional


class Sam(nnx.Module):
    """The network; see the package."""

    def __init__(self, cfg: SamConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.image_encoder = ImageEncoder(cfg, rngs)
        self.prompt_encoder = PromptEncoder(cfg, rngs)
        self.mask_decoder = MaskDecoder(cfg, rngs)

    def encode(self, image_byxc):
        """float[B, S, S, 3], normalised -> x_byxd; once per image, whatever is asked of it."""
        return self.image_encoder(image_byxc)

    def masks(self, image_byxd, prompts_bkpd, dense=None, *, several: bool = False):
        """(logits float32[B, K, M, S / 4, S / 4], iou float32[B, K, M]); above 0 is inside.

        Args:
          image_byxd: of `encode`.
          prompts_bkpd: tokens of each prompt: of `prompt_encoder`, or of another network.
          dense: maps of `prompt_encoder.masks`; None is no mask as a prompt.
          several: three masks of each prompt instead of one.
        """
        dense = self.prompt_encoder.no_mask[...] if dense is None else dense
        grid_yxd = self.prompt_encoder.grid()
        return self.mask_decoder(image_byxd, grid_yxd, prompts_bkpd, dense, several=several)


def normalize(image_u8, sizes_bx=None):
    """uint8[B, S, S, 3] -> float32 in the units of the image encoder, 0 outside of the photo.

    Args:
      image_u8: photos in squares; numpy or jax arrays.
      sizes_bx: int32[B, 4], (x0, y0, x1, y1) of each photo in its square; None is all of it.
    """
    xp = jnp if isinstance(image_u8, jax.Array) else np
    image = (image_u8.astype(xp.float32) - xp.asarray(MEAN, xp.float32)) / xp.asarray(
        STD, xp.float32
    )
    if sizes_bx is None:
        return image
    x0, y0, x1, y1 = (sizes_bx[:, i, None] for i in range(4))
    rows, cols = xp.arange(image.shape[1])[None], xp.arange(image.shape[2])[None]
    inside = ((rows >= y0) & (rows < y1))[:, :, None] & ((cols >= x0) & (cols < x1))[:, None]
    return xp.where(inside[..., None], image, xp.float32(0))


def upsample(logits_yx, side: int):
    """float[..., Y, X] -> float32[..., side, side]: bilinear, between the centres of pixels."""
    shape = (*logits_yx.shape[:-2], side, side)
    return jax.image.resize(logits_yx.astype(jnp.float32), shape, "bilinear", antialias=False)


def make(cfg: SamConfig) -> functional.Functional:
    """The network behind its functional boundary."""
    return functional.Functional(lambda rngs: Sam(cfg, rngs))
