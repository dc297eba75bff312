"""BERT's encoder (Devlin et al., arXiv 1810.04805), used to embed short texts.

    ids ─ word + position + segment tables ─ norm ─ blocks ─ hidden ─ mean over real tokens

A block is norm(x + attention(x)), then norm(x + MLP(x)): the norms come after the sums. No pooler
and no heads: the sentence encoder of NXTP's metric (all-MiniLM-L6-v2) takes the mean.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.nn import attention, mlp, norms
from vlm_jax.ops import matmul


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes.

    Attributes:
      max_tokens: positions.
      segments: rows of the segment table; texts alone are segment 0.
      dtype: compute. param_dtype: storage.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    max_tokens: int = 512
    segments: int = 2
    norm_eps: float = 1e-12
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")


PRESETS = {
    # sentence-transformers/all-MiniLM-L6-v2, config.json; 22,565,376 parameters
    "minilm_l6": BertConfig(30522, 384, 6, 12, 1536),
    "tiny": BertConfig(50, 16, 2, 2, 32, max_tokens=12),  # ours, for tests
}


class Bert(nnx.Module):
    """The encoder."""

    def __init__(self, cfg: BertConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.words = Table(cfg, rngs, cfg.vocab_size)
        self.positions = Table(cfg, rngs, cfg.max_tokens)
        self.segments = Table(cfg, rngs, cfg.segments)
        self.norm = norms.LayerNorm(cfg.width, cfg.norm_eps, cfg.param_dtype)
        self.blocks = nnx.List([Block(cfg, rngs) for _ in range(cfg.depth)])

    def __call__(self, tokens_bt, valid_bt):
        """int32[B, T], bool[B, T] -> hidden_btd of every token, in the compute dtype.

        Raises:
          ValueError: more tokens than positions.
        """
        count = tokens_bt.shape[1]
        if count > self.cfg.max_tokens:
            raise ValueError(f"{count} tokens for {self.cfg.max_tokens} positions; cut them")
        x_btd = jnp.take(self.words.table[...], tokens_bt, axis=0, mode="fill")
        x_btd = x_btd + self.positions.table[...][:count] + self.segments.table[...][0]
        x_btd = self.norm(x_btd.astype(self.cfg.dtype))
        for block in self.blocks:
            x_btd = block(x_btd, valid_bt)
        return x_btd

    def embed(self, tokens_bt, valid_bt):
        """Mean of the real tokens' outputs, float32[B, D]; not of unit length."""
        hidden_btd = self(tokens_bt, valid_bt).astype(jnp.float32)
        weight_bt = valid_bt.astype(jnp.float32)
        total_bd = matmul.einsum("btd,bt->bd", hidden_btd, weight_bt)
        return total_bd / jnp.maximum(weight_bt.sum(axis=1, keepdims=True), 1.0)


class Block(nnx.Module):
    """norm(x + Attention(x)), then norm(x + MLP(x))."""

    def __init__(self, cfg, rngs):
        d, dtype = cfg.width, dict(param_dtype=cfg.param_dtype)
        self.attn = attention.Attention(rngs, d, cfg.num_heads, bias="qkvo", **dtype)
        self.attn_norm = norms.LayerNorm(d, cfg.norm_eps, **dtype)
        self.mlp = mlp.Mlp(rngs, d, cfg.mlp_width, "gelu", bias=True, **dtype)
        self.mlp_norm = norms.LayerNorm(d, cfg.norm_eps, **dtype)

    def __call__(self, x_btd, valid_bt):
        """x_btd -> x_btd."""
        x_btd = self.attn_norm(x_btd + self.attn(x_btd, kv_valid_bs=valid_bt))
        return self.mlp_norm(x_btd + self.mlp(x_btd))


class Table(nnx.Module):
    """Rows that are looked up."""

    def __init__(self, cfg, rngs, rows):
        values = 0.02 * jax.random.normal(rngs.params(), (rows, cfg.width), cfg.param_dtype)
        self.table = nnx.Param(values)
