"""Sizes of SAM and where its parameters live."""

from __future__ import annotations

import dataclasses

from jax.sharding import PartitionSpec as P

# Of pixels on the 0..255 scale; upstream: segment_anything/modeling/sam.py.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """Sizes and execution choices.

    Attributes:
      width, depth, num_heads, mlp_width: of the image encoder; mlp_width 0 is 4 * width.
      global_blocks: blocks whose tokens read the whole image; the others read their window.
      window: side of a window in patches.
      image_size: side in pixels. patch_size: side of a patch.
      prompt_width: of prompts, image maps and the decoder.
      decoder_depth, decoder_heads, decoder_mlp_width: of the two-way transformer.
      num_masks: masks for one prompt where it is ambiguous; one more is made for the rest.
      mask_channels: of the layers that read a mask as a prompt.
      iou_width: hidden layers of the estimate of a mask's IoU.
      norm_eps: of the image encoder, and of all norms over channels; the two-way transformer has
        1e-5.
      dtype: compute. param_dtype: storage.
    """

    width: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    mlp_width: int = 0
    window: int = 14
    image_size: int = 1024
    patch_size: int = 16
    prompt_width: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048
    num_masks: int = 3
    mask_channels: int = 16
    iou_width: int = 256
    norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "global_blocks", tuple(self.global_blocks))
        for name, size, parts in (
            ("width", self.width, self.num_heads),
            ("image_size", self.image_size, self.patch_size),
            ("prompt_width", self.prompt_width, 2 * self.decoder_heads),
            ("prompt_width", self.prompt_width, 8),
        ):
            if size % parts:
                raise ValueError(f"{name} {size} is not a multiple of {parts}")
        if wrong := [i for i in self.global_blocks if not 0 <= i < self.depth]:
            raise ValueError(f"global_blocks {wrong} are not among {self.depth} blocks")
        if self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1")

    @property
    def hidden(self) -> int:
        """Width of the image encoder's MLPs, the default resolved."""
        return self.mlp_width or 4 * self.width

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def low_res(self) -> int:
        """Side of the masks that the decoder makes."""
        return 4 * self.grid

    @property
    def encode_flops(self) -> float:
        """Of encoding an image, forward only: the products of the blocks."""
        places, w = self.grid**2, self.width
        wide = len(self.global_blocks)
        reads = wide * places + (self.depth - wide) * self.window**2
        matrices = self.depth * 2 * (4 * w**2 + 2 * w * self.hidden)
        return float(places * (matrices + 4 * w * reads))


PRESETS = {  # upstream: segment_anything/build_sam.py
    "vit_b": SamConfig(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": SamConfig(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": SamConfig(1280, 32, 16, (7, 15, 23, 31)),
    "tiny": SamConfig(  # ours, for tests: global and window blocks, a window that does not divide
        48, 3, 4, (1,), window=3, image_size=128, prompt_width=32, decoder_heads=4,
        decoder_mlp_width=64, mask_channels=8, iou_width=32,
    ),
}  # fmt: skip

SHARDING_RULES = (
    (r"^image_encoder/patches/kernel$", P(None, None, None, "fsdp")),
    (r"^image_encoder/positions$", P()),
    (r"^image_encoder/blocks/\d+/attn/[qkv]/kernel$", P("fsdp", "tensor", None)),
    (r"^image_encoder/blocks/\d+/attn/[qkv]/bias$", P("tensor", None)),
    (r"^image_encoder/blocks/\d+/attn/o/kernel$", P("tensor", None, "fsdp")),
    (r"^image_encoder/blocks/\d+/attn/(rows|cols)$", P()),
    (r"^image_encoder/blocks/\d+/mlp/up/kernel$", P("fsdp", "tensor")),
    (r"^image_encoder/blocks/\d+/mlp/up/bias$", P("tensor")),
    (r"^image_encoder/blocks/\d+/mlp/down/kernel$", P("tensor", "fsdp")),
    (r"^image_encoder/(patches|blocks/\d+/(attn/o|mlp/down))/bias$", P()),
    (r"^image_encoder/(blocks/\d+/(attn|mlp)_norm|neck/norms/\d)/(scale|bias)$", P()),
    (r"^image_encoder/neck/kernels/\d$", P()),
    # Small beside the encoder, and read by every row.
    (r"^(prompt_encoder|mask_decoder)/", P()),
)
