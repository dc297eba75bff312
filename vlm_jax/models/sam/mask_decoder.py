"""SAM's mask decoder: prompts and an image's encoding -> masks, and how good they are.

    [IoU, mask x 4, prompt tokens] ─┐           ┌─ IoU token ─ MLP ─ estimates
                                    ├─ two-way ─┼─ mask tokens ─ MLPs ─┐
    encoding ───────────────────────┘           └─ map ─ x 4 larger ───┴─ product ─ masks

Mask 0 is for prompts that mean one thing, 1 to 3 for those that may mean three. Kirillov et al.,
arXiv 2304.02643, app. A.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.models.sam.config import SamConfig
from vlm_jax.models.sam.two_way import TwoWay
from vlm_jax.nn import linear, norms, perceptron
from vlm_jax.ops import matmul, partition


class MaskDecoder(nnx.Module):
    """The decoder."""

    def __init__(self, cfg: SamConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        d, count, dtype = cfg.prompt_width, cfg.num_masks + 1, cfg.param_dtype

        def normal(*sizes):
            return nnx.Param(jax.random.normal(rngs.params(), sizes, dtype))

        self.iou_token, self.mask_tokens = normal(1, d), normal(count, d)
        self.two_way = TwoWay(cfg, rngs)
        self.upscale = Upscale(cfg, rngs)

        def head(*sizes):
            dtypes = dict(dtype=cfg.dtype, param_dtype=dtype)
            return perceptron.Perceptron(rngs, sizes, "relu", **dtypes)

        self.mask_heads = nnx.List([head(d, d, d, d // 8) for _ in range(count)])
        self.iou_head = head(d, cfg.iou_width, cfg.iou_width, count)

    def __call__(self, image_byxd, grid_yxd, prompts_bkpd, dense, *, several: bool = False):
        """(logits float32[B, K, M, 4 Y, 4 X], iou float32[B, K, M]).

        Args:
          image_byxd: the image encoder's.
          grid_yxd: `PromptEncoder.grid`.
          prompts_bkpd: tokens of each prompt.
          dense: what is added to the map: `no_mask` [D], or [B, K, Y, X, D] of masks as prompts.
          several: masks 1 to 3 instead of mask 0: M = 3, else 1.
        """
        (b, y, x, d), (k, p) = image_byxd.shape, prompts_bkpd.shape[1:3]
        dtype = self.cfg.dtype
        image = jnp.broadcast_to(image_byxd[:, None], (b, k, y, x, d)).astype(dtype)
        image = (image + dense.astype(dtype)).reshape(b * k, y * x, d)
        own_td = jnp.concatenate([self.iou_token[...], self.mask_tokens[...]]).astype(dtype)
        prompts = prompts_bkpd.reshape(b * k, p, d).astype(dtype)
        own = jnp.broadcast_to(own_td, (b * k, *own_td.shape))
        tokens = jnp.concatenate([own, prompts], axis=1)
        tokens, image = (partition.constrain(z, partition.BATCH, None, None)
                         for z in (tokens, image))  # fmt: skip
        grid_sd = grid_yxd.reshape(y * x, d).astype(dtype)
        tokens, image = self.two_way(tokens, image, grid_sd)
        chosen = range(1, self.cfg.num_masks + 1) if several else (0,)
        rows = [self.mask_heads[i](tokens[:, 1 + i]) for i in chosen]
        large = self.upscale(image.reshape(b * k, y, x, d))
        logits = matmul.einsum(
            "zmc,zyxc->zmyx", jnp.stack(rows, axis=1), large, preferred_element_type=jnp.float32
        )
        iou = self.iou_head(tokens[:, 0])[:, jnp.array(chosen)].astype(jnp.float32)
        return logits.reshape(b, k, *logits.shape[1:]), iou.reshape(b, k, -1)


class Upscale(nnx.Module):
    """Two transposed convolutions of 2x2 pixels: each pixel becomes a square of four."""

    def __init__(self, cfg, rngs):
        d, dtype = cfg.prompt_width, cfg.param_dtype
        sizes = (d, d // 4, d // 8)
        self.layers = nnx.List(
            [
                linear.Linear(rngs, (2, 2, *pair), pair[1:], param_dtype=dtype)
                for pair in zip(sizes, sizes[1:])
            ]
        )
        self.norm = norms.LayerNorm(d // 4, cfg.norm_eps, dtype)

    def __call__(self, x_byxd):
        """[B, Y, X, D] -> [B, 4 Y, 4 X, D / 8]."""
        x = jax.nn.gelu(self.norm(_twice(self.layers[0], x_byxd)), approximate=False)
        return jax.nn.gelu(_twice(self.layers[1], x), approximate=False)


def _twice(layer, x_byxc):
    b, y, x, _ = x_byxc.shape
    squares = layer("byxc,uvcd->byuxvd", x_byxc)
    return squares.reshape(b, 2 * y, 2 * x, -1)
