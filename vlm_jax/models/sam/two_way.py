"""SAM's two-way transformer: tokens of a prompt and the image read each other.

    layer   tokens read tokens ─ tokens read the image ─ MLP ─ the image reads the tokens

Each step is added and normalised. Codes of places are added to queries and keys at every step: to
the image its grid's, to the tokens the tokens themselves as they came in. Kirillov et al., arXiv
2304.02643, app. A.
"""

from __future__ import annotations

from flax import nnx

from vlm_jax.models.sam.config import SamConfig
from vlm_jax.nn import attention, mlp, norms

_EPS = 1e-5


class TwoWay(nnx.Module):
    """The transformer."""

    def __init__(self, cfg: SamConfig, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(cfg, rngs, first=i == 0) for i in range(cfg.decoder_depth)])
        self.read_image = _attention(cfg, rngs, 2)
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
        self.read_tokens = _attention(cfg, rngs, 1)
        self.read_image = _attention(cfg, rngs, 2)
        self.mlp = mlp.Mlp(rngs, d, f, "relu", bias=True, param_dtype=dtype)
        self.image_reads = _attention(cfg, rngs, 2)
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
        tokens = self.norms[2](tokens + self.mlp(tokens))
        image = image + self.image_reads(image + grid_sd, tokens + codes, tokens)
        return tokens, self.norms[3](image)


def _attention(cfg, rngs, narrow):
    """Queries read keys; heads are so many times narrower than the width over heads."""
    fields = dict(head_width=cfg.prompt_width // cfg.decoder_heads // narrow, bias="qkvo")
    dtype = dict(param_dtype=cfg.param_dtype)
    return attention.Attention(rngs, cfg.prompt_width, cfg.decoder_heads, **fields, **dtype)
