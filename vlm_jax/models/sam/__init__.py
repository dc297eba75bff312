"""SAM: masks from an image and prompts (Kirillov et al., arXiv 2304.02643).

    image ─ image_encoder (once) ─ x_byxd ───────────────────────┐
    boxes, points ─ prompt_encoder ─ tokens of each prompt ──────┴─ mask_decoder ─ masks, estimates

Every image has K prompts side by side; its encoding is made once. Arrays are channels last. Images
are normalised on the 0..255 scale (`normalize`) and lie in a square whose other pixels are 0.
"""

from vlm_jax.models.sam.config import MEAN, PRESETS, SHARDING_RULES, STD, SamConfig
from vlm_jax.models.sam.network import Sam, make, normalize, upsample

__all__ = [
    "MEAN",
    "PRESETS",
    "SHARDING_RULES",
    "STD",
    "Sam",
    "SamConfig",
    "make",
    "normalize",
    "upsample",
]
