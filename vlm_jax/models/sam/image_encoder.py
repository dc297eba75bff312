"""SAM's image encoder: a ViT with windows, relative positions and a neck of two convolutions.

    image ─ patches + positions ─ blocks ─ 1x1 conv ─ norm ─ 3x3 conv ─ norm ─ x_byxd

In a window block the map is cut into squares (zeros fill up the right and the bottom; they are read
like anything else), whose tokens read each other. Relative positions are two tables in every block:
a score gets q . rows[row of q - row of k] + q . cols[the same of columns], q unscaled (`GridBias`).
Kirillov et al., arXiv 2304.02643, app. A; Li et al., arXiv 2203.16527.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlm_jax.models.sam.config import SamConfig
from vlm_jax.nn import attention as layers
from vlm_jax.nn import conv, mlp, norms, patches
from vlm_jax.ops import attention, matmul, partition


class ImageEncoder(nnx.Module):
    """The encoder."""

    def __init__(self, cfg: SamConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        size, dtype = cfg.patch_size, cfg.param_dtype
        fields = dict(bias=True, param_dtype=dtype)
        self.patches = patches.PatchEmbed(rngs, size, cfg.width, **fields)
        grid = (cfg.grid, cfg.grid, cfg.width)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), grid, dtype))
        self.blocks = nnx.List(
            [
                Block(cfg, rngs, 0 if i in cfg.global_blocks else cfg.window)
                for i in range(cfg.depth)
            ]
        )
        self.neck = Neck(cfg, rngs)

    def __call__(self, image_byxc):
        """float[B, S, S, 3], normalised -> x_byxd, [B, S / patch, S / patch, prompt_width].

        Raises:
          ValueError: another image size.
        """
        side = self.cfg.image_size
        if image_byxc.shape[1:] != (side, side, 3):
            raise ValueError(
                f"images of {list(image_byxc.shape[1:])}, but SAM takes {[side, side, 3]}: "
                "positions are learned for one size"
            )
        x_byxd = self.patches(image_byxc.astype(self.cfg.dtype))
        x_byxd = x_byxd + self.positions[...].astype(x_byxd.dtype)
        for block in self.blocks:
            x_byxd = block(x_byxd)
        return self.neck(x_byxd)


class Block(nnx.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x)); window 0 is the whole image."""

    def __init__(self, cfg, rngs, window):
        self.window = window
        self.attn_norm = norms.LayerNorm(cfg.width, cfg.norm_eps, cfg.param_dtype)
        self.attn = Attention(cfg, rngs, window or cfg.grid)
        self.mlp_norm = norms.LayerNorm(cfg.width, cfg.norm_eps, cfg.param_dtype)
        self.mlp = mlp.Mlp(
            rngs, cfg.width, cfg.hidden, "gelu", bias=True, param_dtype=cfg.param_dtype
        )

    def __call__(self, x_byxd):
        """x_byxd -> x_byxd."""
        x_byxd = partition.constrain(x_byxd, partition.BATCH, None, None, None)
        normed = self.attn_norm(x_byxd)
        if self.window:
            windows = self.attn(to_windows(normed, self.window))
            update = from_windows(windows, x_byxd.shape[:3], self.window)
        else:
            update = self.attn(normed)
        x_byxd = x_byxd + update
        return x_byxd + self.mlp(self.mlp_norm(x_byxd))


def to_windows(x_byxd, window):
    """[B, Y, X, D] -> [B * windows, window, window, D], zeros behind the map's edges."""
    b, y, x, d = x_byxd.shape
    x_byxd = jnp.pad(x_byxd, ((0, 0), (0, -y % window), (0, -x % window), (0, 0)))
    rows, cols = (size // window for size in x_byxd.shape[1:3])
    split = x_byxd.reshape(b, rows, window, cols, window, d).swapaxes(2, 3)
    return split.reshape(-1, window, window, d)


def from_windows(x_wyxd, shape, window):
    """Inverse of `to_windows`; shape is (B, Y, X)."""
    b, y, x = shape
    rows, cols = -(-y // window), -(-x // window)
    split = x_wyxd.reshape(b, rows, cols, window, window, -1).swapaxes(2, 3)
    return split.reshape(b, rows * window, cols * window, -1)[:, :y, :x]


class Attention(layers.Attention):
    """Of the tokens of a square with one another, `side` patches along it."""

    def __init__(self, cfg, rngs, side):
        dtype = cfg.param_dtype
        super().__init__(rngs, cfg.width, cfg.num_heads, bias="qkvo", param_dtype=dtype)
        table = (2 * side - 1, cfg.width // cfg.num_heads)
        self.rows, self.cols = (nnx.Param(jnp.zeros(table, dtype)) for _ in range(2))

    def __call__(self, x_byxd):
        """x_byxd -> x_byxd."""
        b, y, x, d = x_byxd.shape
        x_btd = x_byxd.reshape(b, y * x, d)
        q_btnh, (k_btnh, v_btnh) = self.queries(x_btd), self.keys_values(x_btd)
        q_byxnh = q_btnh.reshape(b, y, x, *q_btnh.shape[2:])
        rows = matmul.einsum("byxnh,yrh->bnyxr", q_byxnh, _between(self.rows, y, q_btnh.dtype))
        cols = matmul.einsum("byxnh,xch->bnyxc", q_byxnh, _between(self.cols, x, q_btnh.dtype))
        flat = (z.reshape(b, z.shape[1], y * x, z.shape[4]) for z in (rows, cols))
        bias = attention.GridBias(*flat)
        o_btnh = attention.attend(q_btnh, k_btnh, v_btnh, bias=bias)
        return self.merge(o_btnh).reshape(x_byxd.shape)


def _between(table, side, dtype):
    """The table's rows for all pairs of places, [query, key, H]: row q - k + side - 1."""
    places = np.arange(side)
    return table[...].astype(dtype)[places[:, None] - places[None, :] + side - 1]


class Neck(nnx.Module):
    """Two convolutions without biases, each with a norm over the channels behind it."""

    def __init__(self, cfg, rngs):
        d, dtype = cfg.prompt_width, cfg.param_dtype
        sizes = ((1, 1, cfg.width, d), (3, 3, d, d))
        self.kernels = nnx.List(
            [nnx.Param(0.02 * jax.random.normal(rngs.params(), size, dtype)) for size in sizes]
        )
        self.norms = nnx.List([norms.LayerNorm(d, cfg.norm_eps, dtype) for _ in sizes])

    def __call__(self, x_byxd):
        """x_byxd -> x_byxd of prompt_width."""
        for kernel, norm in zip(self.kernels, self.norms):
            margin = kernel.shape[0] // 2
            padding = ((margin, margin),) * 2
            none = jnp.zeros((), x_byxd.dtype)
            x_byxd = norm(conv.conv2d(x_byxd, kernel[...], none, padding=padding))
        return x_byxd
