"""CLIP: an image tower and a text tower (Radford et al., arXiv 2103.00020).

    image ─ patches ─ [class ‖ patches] + positions ─ pre_norm ─ blocks ─ post_norm ─ tokens
                                              embedding ─ projection ─ class token ─┘
    ids ─ table + positions ─ causal blocks ─ final_norm ─ end token ─ projection ─ embedding

A block is x + attention(norm(x)), then x + MLP(norm(x)); the MLP has QuickGELU in all released
OpenAI weights. Norms and softmax are float32.

Blocks are not stacked: `blocks/0/...`, `blocks/1/...`. NXTP trains the last six and NExT-Chat
reads the second-to-last, and only separate parameters can be selected by a path
(`optim.trainable=r"vision/blocks/(18|19|2\\d)/"`). Blocks whose parameters are not differentiated
keep nothing for the backward pass. The price is a compilation that grows with the depth.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.nn import attention, functional, linear, mlp, norms, patches
from vlm_jax.ops import matmul, partition

# Of the pixels, channel by channel; upstream: clip/clip.py, _transform.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class _Defaults:
    """Sizes that both towers derive from their width."""

    @property
    def heads(self) -> int:
        """Attention heads, the default resolved."""
        return self.num_heads or self.width // 64

    @property
    def hidden(self) -> int:
        """Width of the MLP, the default resolved."""
        return self.mlp_width or 4 * self.width


@dataclasses.dataclass(frozen=True)
class VisionConfig(_Defaults):
    """Sizes of an image tower.

    Attributes:
      width: of the hidden states.
      depth: blocks.
      image_size: side in pixels. patch_size: side of a patch.
      num_heads: 0 is width // 64, as in every release.
      mlp_width: 0 is 4 * width.
      projection: width of the embedding shared with the text; 0 has no projection.
      activation: "quick_gelu" or "gelu".
      norm_eps: added to the variance in norms.
      dtype: compute. param_dtype: storage.
      remat: "none", or "full": the backward pass keeps the inputs of blocks only.
    """

    width: int
    depth: int
    patch_size: int
    image_size: int = 224
    num_heads: int = 0
    mlp_width: int = 0
    projection: int = 0
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        _check(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        """Patches of an image: the tokens without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def training_flops(self) -> float:
        """Of an image, forward and backward through all blocks."""
        per_token = 6.0 * (4 * self.width**2 + 2 * self.width * self.hidden)
        per_token += 12 * self.width * (self.num_patches + 1)
        return self.depth * per_token * (self.num_patches + 1)


@dataclasses.dataclass(frozen=True)
class TextConfig(_Defaults):
    """Sizes of a text tower; fields as in `VisionConfig`.

    Attributes:
      max_tokens: positions, 77 in every release.
      end_id: the token whose output stands for the text; -1 is the largest id of each row, which is
        the end token in the released vocabulary.
    """

    width: int
    depth: int
    projection: int
    vocab_size: int = 49408
    max_tokens: int = 77
    end_id: int = -1
    num_heads: int = 0
    mlp_width: int = 0
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        _check(self)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers."""

    vision: VisionConfig
    text: TextConfig

    def __post_init__(self):
        if self.vision.projection != self.text.projection:
            raise ValueError(
                f"the towers meet in one space, but projections are {self.vision.projection} and "
                f"{self.text.projection} wide"
            )


_ACTIVATIONS = ("gelu", "quick_gelu")  # of the releases


def _check(cfg):
    if cfg.width % (cfg.heads or cfg.width + 1):
        raise ValueError(f"width {cfg.width} is not a multiple of num_heads {cfg.heads}")
    if cfg.activation not in _ACTIVATIONS:
        raise ValueError(f"activation {cfg.activation!r} is none of {sorted(_ACTIVATIONS)}")
    if cfg.remat not in ("none", "full"):
        raise ValueError(f"remat {cfg.remat!r} is neither 'none' nor 'full'")


# upstream: clip/model.py builds every size from the shapes of the released files.
VISION_PRESETS = {
    "b32": VisionConfig(768, 12, 32, projection=512),  #     87,849,216 parameters
    "b16": VisionConfig(768, 12, 16, projection=512),  #     86,192,640
    "l14": VisionConfig(1024, 24, 14, projection=768),  #   303,966,208
    "l14_336": VisionConfig(1024, 24, 14, 336, projection=768),  # 304,293,888
    "tiny": VisionConfig(64, 2, 8, 32, num_heads=2, projection=32),  # ours, for tests
}
TEXT_PRESETS = {
    "b": TextConfig(512, 12, 512),  # 63,428,096 parameters; of b32 and b16
    "l": TextConfig(768, 12, 768),  # 123,650,304; of l14 and l14_336
    "tiny": TextConfig(32, 2, 32, vocab_size=100, max_tokens=16, num_heads=2),
}
PRESETS = {
    name: ClipConfig(vision, TEXT_PRESETS["tiny" if name == "tiny" else name[0]])
    for name, vision in VISION_PRESETS.items()
}

SHARDING_RULES = (
    (r"^patches/kernel$", P(None, None, None, "fsdp")),
    (r"^(class_token|positions)$", P()),
    (r"^table$", P("tensor", None)),
    (r"^blocks/\d+/attn/[qkv]/kernel$", P("fsdp", "tensor", None)),
    (r"^blocks/\d+/attn/[qkv]/bias$", P("tensor", None)),
    (r"^blocks/\d+/attn/o/kernel$", P("tensor", None, "fsdp")),
    (r"^blocks/\d+/mlp/up/kernel$", P("fsdp", "tensor")),
    (r"^blocks/\d+/mlp/up/bias$", P("tensor")),
    (r"^blocks/\d+/mlp/down/kernel$", P("tensor", "fsdp")),
    (r"^blocks/\d+/(attn/o|mlp/down)/bias$", P()),
    (r"^(blocks/\d+/(attn|mlp)_norm|pre_norm|post_norm|final_norm)/(scale|bias)$", P()),
    (r"^projection/kernel$", P("fsdp", None)),
)


def normalize(image_u8):
    """uint8[..., 3] -> float32 in the units the towers were trained in; numpy or jax arrays."""
    xp = jnp if isinstance(image_u8, jax.Array) else np
    image01 = image_u8.astype(xp.float32) / xp.float32(255)
    return (image01 - xp.asarray(MEAN, xp.float32)) / xp.asarray(STD, xp.float32)


class VisionTower(nnx.Module):
    """The image tower."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        width = cfg.width
        deviation = width**-0.5  # upstream: VisionTransformer.__init__
        self.patches = patches.PatchEmbed(rngs, cfg.patch_size, width, param_dtype=cfg.param_dtype)
        self.class_token = nnx.Param(_normal(cfg, rngs, (width,), deviation))
        self.positions = nnx.Param(_normal(cfg, rngs, (cfg.num_patches + 1, width), deviation))
        self.pre_norm = norms.LayerNorm(width, cfg.norm_eps, cfg.param_dtype)
        self.blocks = nnx.List([Block(cfg, rngs) for _ in range(cfg.depth)])
        self.post_norm = norms.LayerNorm(width, cfg.norm_eps, cfg.param_dtype)
        if cfg.projection:
            self.projection = _projection(cfg, rngs)

    def __call__(self, image_byxc):
        """float[B, S, S, 3], normalised -> embedding float32[B, projection], not of unit length."""
        return self.embed(self.tokens(image_byxc))

    def tokens(self, image_byxc, *, num_blocks: int | None = None, post_norm: bool = True):
        """All tokens of the images.

        Args:
          image_byxc: float[B, S, S, 3], normalised (`normalize`).
          num_blocks: stop after that many; None is all, -1 all but the last.
          post_norm: apply the last norm, to all tokens. CLIP itself applies it to the class token.

        Returns:
          x_btd in the compute dtype, t = 1 + patches, the class token first.

        Raises:
          ValueError: another image size.
        """
        x_btd = self._enter(image_byxc)
        x_btd = _run(self.blocks[slice(num_blocks)], x_btd, self.cfg, causal=False)
        return self.post_norm(x_btd) if post_norm else x_btd

    def hidden_states(self, image_byxc):
        """What enters the first block and what leaves each, [depth + 1, B, t, width].

        Before the last norm, as transformers' `output_hidden_states` gives them; t and the image as
        in `tokens`.
        """
        states = [self._enter(image_byxc)]
        _run(self.blocks, states[0], self.cfg, causal=False, states=states)
        return jnp.stack(states)

    def _enter(self, image_byxc):
        side, channels = self.cfg.image_size, 3
        if image_byxc.shape[1:] != (side, side, channels):
            raise ValueError(
                f"images of {list(image_byxc.shape[1:])}, but the tower takes "
                f"{[side, side, channels]}: positions are learned for one size"
            )
        x_byxd = self.patches(image_byxc.astype(self.cfg.dtype))
        x_bpd = x_byxd.reshape(x_byxd.shape[0], -1, self.cfg.width)
        class_b1d = jnp.broadcast_to(
            self.class_token[...].astype(x_bpd.dtype), (x_bpd.shape[0], 1, self.cfg.width)
        )
        x_btd = jnp.concatenate([class_b1d, x_bpd], axis=1)
        return self.pre_norm(x_btd + self.positions[...].astype(x_btd.dtype))

    def embed(self, x_btd):
        """`tokens` -> embedding float32[B, projection] of the class token."""
        return self.projection("bd,de->be", x_btd[:, 0]).astype(jnp.float32)


class TextTower(nnx.Module):
    """The text tower."""

    def __init__(self, cfg: TextConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.table = nnx.Param(_normal(cfg, rngs, (cfg.vocab_size, cfg.width), 0.02))
        self.positions = nnx.Param(_normal(cfg, rngs, (cfg.max_tokens, cfg.width), 0.01))
        self.blocks = nnx.List([Block(cfg, rngs) for _ in range(cfg.depth)])
        self.final_norm = norms.LayerNorm(cfg.width, cfg.norm_eps, cfg.param_dtype)
        self.projection = _projection(cfg, rngs)

    def __call__(self, tokens_bt):
        """int32[B, T], T up to max_tokens -> embedding float32[B, projection].

        A row is begin token, text, end token, then anything below the end token's id.

        Raises:
          ValueError: more tokens than positions.
        """
        x_btd = self.final_norm(_run(self.blocks, self._enter(tokens_bt), self.cfg, causal=True))
        marks_bt = tokens_bt if self.cfg.end_id < 0 else tokens_bt == self.cfg.end_id
        end_b = jnp.argmax(marks_bt, axis=1)
        x_bd = jnp.take_along_axis(x_btd, end_b[:, None, None], axis=1)[:, 0]
        return self.projection("bd,de->be", x_bd).astype(jnp.float32)

    def hidden_states(self, tokens_bt):
        """What enters the first block and what leaves each, [depth + 1, B, T, width].

        Before the last norm, as transformers' `output_hidden_states` gives them.
        """
        states = [self._enter(tokens_bt)]
        _run(self.blocks, states[0], self.cfg, causal=True, states=states)
        return jnp.stack(states)

    def _enter(self, tokens_bt):
        num_tokens = tokens_bt.shape[1]
        if num_tokens > self.cfg.max_tokens:
            raise ValueError(f"{num_tokens} tokens for {self.cfg.max_tokens} positions; cut them")
        x_btd = jnp.take(self.table[...], tokens_bt, axis=0, mode="fill").astype(self.cfg.dtype)
        return x_btd + self.positions[...][:num_tokens].astype(x_btd.dtype)


class Clip(nnx.Module):
    """Both towers and the temperature between them."""

    def __init__(self, cfg: ClipConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.vision = VisionTower(cfg.vision, rngs)
        self.text = TextTower(cfg.text, rngs)
        # upstream: log(1 / 0.07), and at most log(100) in training.
        self.logit_scale = nnx.Param(jnp.asarray(2.6592600, cfg.vision.param_dtype))

    def __call__(self, image_byxc, tokens_bt):
        """Scaled cosines of all images and texts, float32[B_image, B_text]."""
        image_be, text_be = unit(self.vision(image_byxc)), unit(self.text(tokens_bt))
        scale = jnp.exp(self.logit_scale[...].astype(jnp.float32))
        return scale * matmul.einsum("ie,te->it", image_be, text_be)


def unit(x_be):
    """Rows of length one."""
    return x_be / jnp.linalg.norm(x_be, axis=-1, keepdims=True)


class Block(nnx.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, cfg, rngs):
        # upstream: CLIP.initialize_parameters
        inner, outer = cfg.width**-0.5, cfg.width**-0.5 * (2 * cfg.depth) ** -0.5
        fields = dict(out_scale=outer, param_dtype=cfg.param_dtype)
        self.attn_norm = norms.LayerNorm(cfg.width, cfg.norm_eps, cfg.param_dtype)
        self.attn = attention.Attention(
            rngs, cfg.width, cfg.heads, bias="qkvo", scale=inner, **fields
        )
        self.mlp_norm = norms.LayerNorm(cfg.width, cfg.norm_eps, cfg.param_dtype)
        wide = dict(bias=True, scale=(2 * cfg.width) ** -0.5)
        self.mlp = mlp.Mlp(rngs, cfg.width, cfg.hidden, cfg.activation, **wide, **fields)

    def __call__(self, x_btd, causal):
        """x_btd -> x_btd."""
        x_btd = partition.constrain(x_btd, partition.BATCH, None, None)
        x_btd = x_btd + self.attn(self.attn_norm(x_btd), causal=causal)
        return x_btd + self.mlp(self.mlp_norm(x_btd))


def make(cfg: ClipConfig) -> functional.Functional:
    """Both towers behind the functional boundary: `.init(rng)`, `.abstract()`, `.bind(params)`."""
    return functional.Functional(lambda rngs: Clip(cfg, rngs))


def _run(blocks, x_btd, cfg, causal, states=None):
    """What leaves the last block; what leaves each is put behind `states`, a list."""
    for block in blocks:

        def call(x_btd, block=block):
            return block(x_btd, causal)

        x_btd = jax.checkpoint(call)(x_btd) if cfg.remat == "full" else call(x_btd)
        if states is not None:
            states.append(x_btd)
    return x_btd


def _projection(cfg, rngs):
    sizes = cfg.width, cfg.projection
    return linear.Linear(rngs, sizes, scale=cfg.width**-0.5, param_dtype=cfg.param_dtype)


def _normal(cfg, rngs, sizes, deviation):
    return deviation * jax.random.normal(rngs.params(), sizes, cfg.param_dtype)
