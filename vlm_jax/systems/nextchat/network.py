"""The network: an image tower, a language model, and a box in place of a token.

    image ─ CLIP, all blocks but one ─ projector ─┐ <im_patch>
    tokens ───────────────── embed ───────────────┼─ LLaMA ─ hidden ─┬─ head ─ logits
    boxes ────────────────── box_encoder ─────────┘ <boxes>          │
                                             <at> ┌──────────────────┤
                                     mask_prompt ─┤    box_decoder ──┴─ boxes
    image ─ SAM's image encoder ─ SAM's mask decoder ─ masks

Zhang et al., arXiv 2311.04498, sec. 3. The model says `<at>` where it wants to show something; the
hidden state there is a location, which `box_decoder` turns into a box. The token behind it is
always `<boxes>`, whose vector is not a row of the table but `box_encoder` of the box: of the true
one in training, of the user's for a region in a question, of the one just decoded in generation.

Boxes are (x0, y0, x1, y1) as fractions of the side of the image's padded square; what the decoder
gives may leave 0..1 and have its corners reversed. A row has a fixed number of locations with a
validity each (`ops.slots`), so rows do not depend on one another.

A mask is SAM's, prompted with four tokens made of the location and the two corners of its box. An
image is encoded once, whatever the number of its locations. Without `cfg.sam` there are no masks:
stages 1 and 2.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.models import clip, llama
from vlm_jax.models import sam as sam_lib
from vlm_jax.nn import functional, perceptron
from vlm_jax.ops import slots

# Behind the vocabulary, in this order.
ADDED_TOKENS = ("<im_patch>", "<im_start>", "<im_end>", "<at>", "<boxes>")
NUM_ADDED = len(ADDED_TOKENS)


@dataclasses.dataclass(frozen=True)
class NextChatConfig:
    """Sizes of all parts.

    Attributes:
      vision: of the image tower; what its last block and norm would make is not read.
      decoder: of the language model; `vocab_size` counts the added tokens.
      projector_depth: matrices between the tower and the language model.
      sam: of the part that makes masks; None has none.
      num_prompt_tokens: tokens that prompt a mask besides the box.
    """

    vision: clip.VisionConfig
    decoder: llama.LlamaConfig
    projector_depth: int = 2
    sam: sam_lib.SamConfig | None = None
    num_prompt_tokens: int = 4

    def __post_init__(self):
        if self.vision.projection:
            object.__setattr__(self, "vision", dataclasses.replace(self.vision, projection=0))
        if self.vision.depth < 2:
            raise ValueError(
                f"vision.depth is {self.vision.depth}, but features are those before the last "
                "block; it must be at least 2"
            )
        if self.decoder.width % 2:
            raise ValueError(f"decoder.width {self.decoder.width} must be even: boxes use half")
        if self.decoder.vocab_size <= NUM_ADDED:
            raise ValueError(
                f"decoder.vocab_size {self.decoder.vocab_size} counts the {NUM_ADDED} added tokens "
                "and must be larger"
            )
        if self.projector_depth < 1:
            raise ValueError(f"projector_depth {self.projector_depth} must be at least 1")
        if self.num_prompt_tokens < 1:
            raise ValueError(f"num_prompt_tokens {self.num_prompt_tokens} must be at least 1")

    @property
    def num_image(self) -> int:
        """Vectors of an image, and so `<im_patch>` tokens of one."""
        return self.vision.num_patches

    @property
    def num_base(self) -> int:
        """Ids of the language model without the added ones."""
        return self.decoder.vocab_size - NUM_ADDED

    @property
    def patch_id(self) -> int:
        """`<im_patch>`: a place of the image."""
        return self.num_base

    @property
    def start_id(self) -> int:
        """`<im_start>`, before the patches."""
        return self.num_base + 1

    @property
    def end_id(self) -> int:
        """`<im_end>`, behind the patches."""
        return self.num_base + 2

    @property
    def at_id(self) -> int:
        """`<at>`: a location is meant; its hidden state is the location."""
        return self.num_base + 3

    @property
    def boxes_id(self) -> int:
        """`<boxes>`: stands behind `<at>`, and its vector is that of a box."""
        return self.num_base + 4


def _vicuna(width, depth, mlp_width, heads):
    # LLaMA 2's sizes and 32,000 pieces; Vicuna 1.5 keeps them.
    return llama.LlamaConfig(32_000 + NUM_ADDED, width, depth, mlp_width, heads, rms_eps=1e-5)


_SMOLLM2 = llama.PRESETS["smollm2_135m"]
DECODERS = {
    "vicuna_7b": _vicuna(4096, 32, 11008, 32),
    "vicuna_13b": _vicuna(5120, 40, 13824, 40),
    "smollm2": dataclasses.replace(_SMOLLM2, vocab_size=_SMOLLM2.vocab_size + NUM_ADDED),
    "tiny": llama.LlamaConfig(400 + NUM_ADDED, 64, 2, 112, 4, rms_eps=1e-5, max_tokens=1024),
}
VISIONS = {
    **clip.VISION_PRESETS,
    "tiny": clip.VisionConfig(32, 3, 14, 56, num_heads=4, mlp_width=64),
}
SAMS = sam_lib.PRESETS
PRESETS = {
    "7b_336": NextChatConfig(VISIONS["l14_336"], DECODERS["vicuna_7b"]),
    "7b_336_masks": NextChatConfig(VISIONS["l14_336"], DECODERS["vicuna_7b"], sam=SAMS["vit_h"]),
    "tiny": NextChatConfig(VISIONS["tiny"], DECODERS["tiny"]),
    "tiny_masks": NextChatConfig(VISIONS["tiny"], DECODERS["tiny"], sam=SAMS["tiny"]),
}


# Boxes are four numbers, and the modules that read and write them small.
_HEAD_RULES = (
    (r"^projector/layers/\d+/kernel$", P("fsdp", "tensor")),
    (r"^box_(encoder|decoder)/layers/\d+/kernel$", P()),
    (r"^(projector|box_encoder|box_decoder|mask_prompt)/layers/\d+/bias$", P()),
    (r"^mask_prompt/layers/\d+/kernel$", P("fsdp", "tensor")),
)


def _under(part, rules):
    return tuple((rule.replace("^", f"^{part}/", 1), spec) for rule, spec in rules)


_TOWER_RULES = (
    *_under("vision", clip.SHARDING_RULES),
    *_under("sam", sam_lib.SHARDING_RULES),
    *_HEAD_RULES,
)
SHARDING_RULES = (*_TOWER_RULES, *_under("decoder", llama.SHARDING_RULES))
INFERENCE_RULES = (*_TOWER_RULES, *_under("decoder", llama.DECODE_SHARDING_RULES))


class NextChat(nnx.Module):
    """All of it; see the module."""

    def __init__(self, cfg: NextChatConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        width, half = cfg.decoder.width, cfg.decoder.width // 2
        dtypes = dict(dtype=cfg.decoder.dtype, param_dtype=cfg.decoder.param_dtype)
        self.vision = clip.VisionTower(cfg.vision, rngs)
        sizes = (cfg.vision.width, *(width,) * cfg.projector_depth)
        self.projector = perceptron.Perceptron(rngs, sizes, "gelu", torch_start=True, **dtypes)
        self.decoder = llama.Llama(cfg.decoder, rngs)
        # In float32 whatever the decoder's dtype: bfloat16 has 256 numbers between 0.5 and 1.
        dtypes["dtype"] = "float32"
        self.box_encoder = perceptron.Perceptron(rngs, (4, half, width), "relu", **dtypes)
        self.box_decoder = perceptron.Perceptron(rngs, (width, half, 4), "relu", **dtypes)
        if cfg.sam:
            sizes = (width, width, cfg.num_prompt_tokens * cfg.sam.prompt_width)
            self.mask_prompt = perceptron.Perceptron(
                rngs, sizes, "relu", torch_start=True, **dtypes
            )
            self.sam = sam_lib.Sam(cfg.sam, rngs)

    def image_features(self, image_byxc):
        """float[B, S, S, 3], normalised -> x_bpc of the patches before the tower's last block.

        Without gradients: the tower is never trained.
        """
        x_btc = self.vision.tokens(image_byxc, num_blocks=-1, post_norm=False)
        return jax.lax.stop_gradient(x_btc[:, 1:])

    def image_vectors(self, image_byxc):
        """float[B, S, S, 3], normalised -> x_bpd for the decoder, p = `cfg.num_image`."""
        return self.projector(self.image_features(image_byxc))

    def inputs(
        self, tokens_bt, image_byxc=None, boxes_bkx=None, boxes_valid_bk=None, image_bpd=None
    ):
        """What the decoder reads.

        Args:
          tokens_bt: int32.
          image_byxc: float[B, S, S, 3], normalised, one image per row. A row without `<im_patch>`
            does not read its image. None is no images.
          boxes_bkx: float32[B, K, 4], of the `<boxes>` tokens of each row in their order. None,
            and tokens beyond the valid ones, keep the row of the table.
          boxes_valid_bk: bool; None is all.
          image_bpd: of `image_vectors`, where the image was encoded before.

        Returns:
          x_btd in the decoder's compute dtype.
        """
        x_btd = self.decoder.embed(tokens_bt)
        if image_byxc is not None:
            image_bpd = self.image_vectors(image_byxc)
        if image_bpd is not None:
            x_btd = slots.put(x_btd, tokens_bt == self.cfg.patch_id, image_bpd)
        if boxes_bkx is not None:
            if boxes_valid_bk is not None:  # what is in empty slots reaches no gradient
                boxes_bkx = jnp.where(boxes_valid_bk[..., None], boxes_bkx, 0.0)
            marks_bt = tokens_bt == self.cfg.boxes_id
            x_btd = slots.put(x_btd, marks_bt, self.box_encoder(boxes_bkx), boxes_valid_bk)
        return x_btd

    def hidden(self, x_btd, valid_bt):
        """Outputs of the decoder behind its last norm, hidden_btd.

        Places are counted by column, padding included; upstream does so with left padding too,
        which the angles of rotary embedding do not show.

        Args:
          x_btd: of `inputs`.
          valid_bt: bool, False for tokens that nobody reads.
        """
        positions_bt = jnp.arange(x_btd.shape[1])[None]
        return self.decoder.transform(x_btd, positions_bt=positions_bt, valid_bt=valid_bt)[0]

    def locations(self, hidden_btd, tokens_bt, num_slots: int):
        """(states float32 at `<at>` as input [B, K, D], valid_bk), K = num_slots, left to right."""
        states_bkd, valid_bk = slots.take(hidden_btd, tokens_bt == self.cfg.at_id, num_slots)
        return states_bkd.astype(jnp.float32), valid_bk

    def encode_for_masks(self, image_byxc):
        """float[B, S, S, 3], `sam.normalize`d -> the encoding of each image, once for all masks.

        Without gradients: SAM's image encoder is never trained.
        """
        return jax.lax.stop_gradient(self.sam.encode(image_byxc))

    def masks(self, encoding_byxd, states_bkd, boxes_bkx):
        """A mask for every location.

        Args:
          encoding_byxd: of `encode_for_masks`.
          states_bkd: float32, of `locations`.
          boxes_bkx: float32[B, K, 4], what `box_decoder` made of them.

        Returns:
          (logits float32[B, K, Y, X] of a quarter of SAM's side, above 0 is inside; iou
          float32[B, K], SAM's estimate of how good a mask is).
        """
        b, k, _ = states_bkd.shape
        own_bkpd = self.mask_prompt(states_bkd).reshape(b, k, self.cfg.num_prompt_tokens, -1)
        corners_bkpd = self.sam.prompt_encoder.boxes(boxes_bkx * self.cfg.sam.image_size)
        prompts_bkpd = jnp.concatenate([own_bkpd, corners_bkpd], axis=2)
        logits_bkmyx, iou_bkm = self.sam.masks(encoding_byxd, prompts_bkpd)
        return logits_bkmyx[:, :, 0], iou_bkm[:, :, 0]


def make(cfg: NextChatConfig) -> functional.Functional:
    """The network behind its functional boundary."""
    return functional.Functional(lambda rngs: NextChat(cfg, rngs))
