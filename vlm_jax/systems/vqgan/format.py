"""Photos in, batches for the tokenizer out. Numpy only.

    key       dtype[shape]            meaning
    image01   float32[B, S, S, 3]     RGB in [0, 1]
    valid     bool[B]                 added by the pipeline; False where a record was unreadable

A record holds `image_u8`, or an encoded picture under `jpg`, `jpeg`, `png`, `webp` or `image`
(as tar shards and TFDS have them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.data import images

_CROPS = ("none", "center", "random")


@dataclasses.dataclass(frozen=True)
class Formatter:
    """Record -> {"image01"}.

    Attributes:
      size: S, side of the result in pixels.
      crop: before resizing: "none" stretches the whole picture as LVM's preparation does,
        "center" takes the central square, "random" a random square.
      min_crop: smallest side of a random square, as a fraction of the short side.
      flip: mirror half of the pictures. Never for evaluation.
    """

    size: int = 256
    crop: str = "none"
    min_crop: float = 0.5
    flip: bool = False

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"formatter.size={self.size} must be positive")
        if self.crop not in _CROPS:
            raise ValueError(f"formatter.crop={self.crop!r} is none of {', '.join(_CROPS)}")
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"formatter.min_crop={self.min_crop} is not in (0, 1]")

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """One picture. Random choices come from `rng` alone."""
        image_u8 = images.of_record(record)
        if self.crop == "center":
            image_u8 = images.crop_square(image_u8)
        elif self.crop == "random":
            side = max(1, round(self.min_crop * min(image_u8.shape[:2])))
            image_u8 = images.random_crop(image_u8, rng, min_side=side, flip=False)
        image_u8 = images.resize(np.ascontiguousarray(image_u8), self.size)
        if self.flip and rng.random() < 0.5:
            image_u8 = image_u8[:, ::-1]
        return {"image01": images.to01(image_u8)}


make_formatter = Formatter
