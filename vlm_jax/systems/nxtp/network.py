"""The network: an image tower, a linear map, the first blocks of a language model.

    image ─ vision ─ tokens ─ projection ─ (class token dropped) ─┐
                                                                  ├─ decoder ─ logits
    ids ─────────────────────────────── embed ────────────────────┘

Yue et al., arXiv 2312.02142, sec. 3.1. The decoder is a LLaMA that keeps its first blocks, its last
norm and its head; cutting it is slicing the stacked layers. Two tokens are added behind its
vocabulary: the marker between image and text, and the one that stands at padding places. The
marker's vector is a parameter of its own (`decoder/embed/image`), because it is the only row of the
table that NXTP trains.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.models import clip, llama, vgg_tower
from vlm_jax.nn import functional
from vlm_jax.ops import matmul, partition

NUM_ADDED = 2  # ids behind the vocabulary: image marker, then empty


@dataclasses.dataclass(frozen=True)
class NxtpConfig:
    """Sizes of both halves; `decoder.vocab_size` counts the two added tokens."""

    vision: clip.VisionConfig | vgg_tower.VggTowerConfig
    decoder: llama.LlamaConfig

    def __post_init__(self):
        if self.vision.projection:
            object.__setattr__(self, "vision", dataclasses.replace(self.vision, projection=0))

    @property
    def num_image(self) -> int:
        """Vectors of an image in front of the text."""
        return self.vision.num_patches

    @property
    def image_id(self) -> int:
        """The marker between image and text."""
        return self.decoder.vocab_size - 2

    @property
    def empty_id(self) -> int:
        """The token at padding places."""
        return self.decoder.vocab_size - 1


def _llama(depth):
    # LLaMA 7B and its tokenizer's 32,000 pieces; upstream: src/decoders/llama.py
    return llama.LlamaConfig(
        32_000 + NUM_ADDED, 4096, depth, 11008, 32, rms_eps=1e-5, max_tokens=512
    )


_SMOLLM2 = llama.PRESETS["smollm2_135m"]
DECODERS = {  # paper, table 3; 1.78 B parameters with six blocks
    **{f"llama_{depth}": _llama(depth) for depth in (1, 3, 6, 12, 32)},
    "smollm2": dataclasses.replace(_SMOLLM2, vocab_size=_SMOLLM2.vocab_size + NUM_ADDED),
    "tiny": llama.LlamaConfig(64 + NUM_ADDED, 32, 2, 64, 2, rms_eps=1e-5, max_tokens=128),
}
VISIONS = {**clip.VISION_PRESETS, **vgg_tower.PRESETS}


def section_of(cfg: NxtpConfig) -> dict[str, dict]:
    """`config.model` that makes this config; the preset says which kind of tower it is."""
    preset = next(name for name, tower in VISIONS.items() if type(tower) is type(cfg.vision))
    vision = {"preset": preset, **dataclasses.asdict(cfg.vision)}
    return {"vision": vision, "decoder": dataclasses.asdict(cfg.decoder)}


SHARDING_RULES = (
    *(
        (rule.replace("^", "^vision/", 1), spec)
        for rule, spec in (*clip.SHARDING_RULES, *vgg_tower.SHARDING_RULES)
    ),
    (r"^projection/kernel$", P("fsdp", None)),
    (r"^decoder/embed/(image|empty)$", P()),
    *((rule.replace("^", "^decoder/", 1), spec) for rule, spec in llama.SHARDING_RULES),
)


INFERENCE_RULES = (
    *SHARDING_RULES[: -len(llama.SHARDING_RULES)],
    *((rule.replace("^", "^decoder/", 1), spec) for rule, spec in llama.DECODE_SHARDING_RULES),
)


class ImageHalf(nnx.Module):
    """The tower and the projection: images as vectors for the decoder."""

    def __init__(self, cfg: NxtpConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        clips = isinstance(cfg.vision, clip.VisionConfig)
        self.vision = (clip.VisionTower if clips else vgg_tower.VggTower)(cfg.vision, rngs)
        self.projection = Projection(cfg, rngs)

    def image_vectors(self, image_byxc):
        """float[B, S, S, 3], normalised -> x_bpd for the decoder, p = `cfg.num_image`."""
        return self.projection(self.vision.tokens(image_byxc))[:, 1:]


class Nxtp(ImageHalf):
    """All of it; see the module."""

    def __init__(self, cfg: NxtpConfig, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.decoder = Decoder(cfg.decoder, rngs)

    def inputs(self, image_byxc, tokens_bt):
        """The decoder's input x_bsd: image, then text."""
        image_bpd = self.image_vectors(image_byxc)
        return jnp.concatenate([image_bpd, self.decoder.embed(tokens_bt)], axis=1)


class Projection(nnx.Module):
    """One matrix from the tower's width to the decoder's."""

    def __init__(self, cfg, rngs):
        shape = cfg.vision.width, cfg.decoder.width
        noise = jax.random.normal(rngs.params(), shape, cfg.decoder.param_dtype)
        self.kernel = nnx.Param(noise * shape[0] ** -0.5)  # upstream: models/clip.py
        self.dtype = cfg.decoder.dtype

    def __call__(self, x_btc):
        """x_btc of the tower -> x_btd."""
        kernel_cd = self.kernel[...].astype(self.dtype)
        return matmul.einsum("btc,cd->btd", x_btc.astype(self.dtype), kernel_cd)


class Decoder(llama.Llama):
    """A LLaMA with the two added tokens. Tied heads give no logits for those."""

    def __init__(self, cfg: llama.LlamaConfig, rngs: nnx.Rngs):
        super().__init__(cfg, rngs)
        self.embed = Embed(cfg, rngs)


class Embed(nnx.Module):
    """tokens_bt -> x_btd in the compute dtype. Ids outside the vocabulary give NaN."""

    def __init__(self, cfg, rngs):
        self.dtype, self.num_base = cfg.dtype, cfg.vocab_size - NUM_ADDED
        plain = llama.Embed(dataclasses.replace(cfg, vocab_size=self.num_base), rngs)
        self.table = plain.table
        # Standard normal; upstream: models/llama.py, where the table is extended.

        def draw():
            return jax.random.normal(rngs.params(), (cfg.width,), cfg.param_dtype)

        self.image, self.empty = nnx.Param(draw()), nnx.Param(draw())

    def __call__(self, tokens_bt):
        """tokens_bt -> x_btd."""
        x_btd = jnp.take(self.table[...], tokens_bt, axis=0, mode="fill")
        for token_id, row in ((self.num_base, self.image), (self.num_base + 1, self.empty)):
            x_btd = jnp.where((tokens_bt == token_id)[..., None], row[...], x_btd)
        return partition.constrain(x_btd.astype(self.dtype), partition.BATCH, None, None)


def make(cfg: NxtpConfig) -> functional.Functional:
    """The network behind its functional boundary."""
    return functional.Functional(lambda rngs: Nxtp(cfg, rngs))


def make_image_half(cfg: NxtpConfig) -> functional.Functional:
    """The tower and the projection alone."""
    return functional.Functional(lambda rngs: ImageHalf(cfg, rngs))


def make_decoder(cfg: llama.LlamaConfig) -> functional.Functional:
    """The decoder alone, for sampling with `llama.decode_form`."""
    return functional.Functional(lambda rngs: Decoder(cfg, rngs))
