"""SAM's two-way transformer: tokens of a prompt and the image read each other.

    layer   tokens read tokens ─ tokens read the image ─ MLP ─ the image reads the tokens

Each step is added and normalised. Codes of places are added to queries and keys at every step: to
the image its grid's, to the tokens the tokens themselves as they came in. Kirillov et al., arXiv
2304.02643, app. A.
"""

from __future__ import annotations

import jax
from flax import nnx

from vlm_jax.models.sam.config import SamConfig
from vlm_jax.nn import linear, norms
from vlm_jax.ops import attention

_EPS = 1e-5


class TwoWay(nnx.Module):
    """The transformer."""

    def __init__(self, cfg: SamConfig, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(cfg, rngs, first=i == 0) for i in range(cfg.decoder_depth)])
        self.read_image = Attention(cfg, rngs, 2)
        self.norm = norms.LayerNorm(cfg.prompt_width, _EPS, cfg.param_dtype)

    def __call__(self, tokens_btd, image_bsd, grid_sd):
        """(tokens_btd, image_bsd).

        Args:
          tokens_btd: of a prompt. image_bsd: the image's map, flat.
          grid_sd: the code of its places.
        """
        codes_btd, image = tokens_btd, image_bsd
        for layer in self.layers:
            tokens_btd, image = layer(tokens_btd, image, codes_btd, grid_sd)
        read = self.read_image(tokens_btd + codes_btd, image + grid_sd, image)
        return self.norm(tokens_btd + read), image


class Layer(nnx.Module):
    """One layer; the first has no codes in its first step, whose result replaces the tokens."""

    def __init__(self, cfg, rngs, first):
        self.first = first
        d, f, dtype = cfg.prompt_width, cfg.decoder_mlp_width, cfg.param_dtype
        self.read_tokens = Attention(cfg, rngs, 1)
        self.read_image = Attention(cfg, rngs, 2)
        self.up = linear.Linear(rngs, (d, f), (f,), param_dtype=dtype)
        self.down = linear.Linear(rngs, (f, d), (d,), param_dtype=dtype)
        self.image_reads = Attention(cfg, rngs, 2)
        self.norms = nnx.List([norms.LayerNorm(d, _EPS, dtype) for _ in range(4)])

    def __call__(self, tokens, image, codes, grid_sd):
        """(tokens_btd, image_bsd)."""
        if self.first:
            tokens = self.read_tokens(tokens, tokens, tokens)
        else:
            coded = tokens + codes
            tokens = tokens + self.read_tokens(coded, coded, tokens)
        tokens = self.norms[0](tokens)
        tokens = tokens + self.read_image(tokens + codes, image + grid_sd, image)
        tokens = self.norms[1](tokens)
        hidden = jax.nn.relu(self.up("btd,df->btf", tokens))
        tokens = self.norms[2](tokens + self.down("btf,fd->btd", hidden))
        image = image + self.image_reads(image + grid_sd, tokens + codes, tokens)
        return tokens, self.norms[3](image)


class Attention(nnx.Module):
    """Queries read keys; `narrow`: heads are so many times narrower than the width over heads."""

    def __init__(self, cfg, rngs, narrow):
        d, n = cfg.prompt_width, cfg.decoder_heads
        h, dtype = d // n // narrow, dict(param_dtype=cfg.param_dtype)
        self.q = linear.Linear(rngs, (d, n, h), (n, h), **dtype)
        self.k = linear.Linear(rngs, (d, n, h), (n, h), **dtype)
        self.v = linear.Linear(rngs, (d, n, h), (n, h), **dtype)
        self.o = linear.Linear(rngs, (n, h, d), (d,), **dtype)

    def __call__(self, q_btd, k_bsd, v_bsd):
        """Queries, keys and values before their matrices -> x_btd."""
        q_btnh = self.q("btd,dnh->btnh", q_btd)
        k_bsnh, v_bsnh = self.k("bsd,dnh->bsnh", k_bsd), self.v("bsd,dnh->bsnh", v_bsd)
        return self.o("btnh,nhd->btd", attention.attend(q_btnh, k_bsnh, v_bsnh))
