"""Scenes with exact masks: real cut-outs pasted on real textures, as many as wanted.

    part        train                                   held out
    cut-outs    16 coins, rocket, husks, car, cap,      8 other coins, 9 strawberries, another car
                drum, shoe, eagle, insect               (a class and photos that training never has)
    textures    left halves of grass, gravel, brick,    right halves
                moon

Occlusion is exact, because an owner is kept for every pixel. For masks, boxes and pointing, where
hand-drawn data would be too few.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlm_jax.data import images, records, wheels
from vlm_jax.datasets import demo_annotations

_TEXTURES = ("grass", "gravel", "brick", "moon")
_HELDOUT_COINS = 8  # of 24: the last ones of the list
_MIN_VISIBLE = 0.3  # of a cut-out's pixels; a thing that is hidden further is left out


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Random-access source of scenes. Scene i is the same on every machine.

    Args:
      split: "train" or "heldout".
      count: number of scenes.
      size: side in pixels.
      things: most cut-outs in a scene, at least one.
      seed: of everything random.
    """

    split: str = "train"
    count: int = 1000
    size: int = 64
    things: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.split not in ("train", "heldout"):
            raise records.DataError(f"split {self.split!r} is not 'train' or 'heldout'")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> records.Record:
        """image_u8 uint8[S, S, 3], masks bool[n, S, S] of what is visible, labels of n."""
        rng = np.random.default_rng([self.seed, self.split == "heldout", index])
        wanted = int(rng.integers(1, self.things + 1))
        image_u8 = texture(self.split, self.size, rng)
        owner = np.full((self.size, self.size), -1)
        labels, areas = [], []
        for number in range(wanted):
            label, rgba = _pick(self.split, rng)
            labels.append(label)
            areas.append(_paste(image_u8, owner, rgba, number, rng))
        masks = np.stack([owner == number for number in range(wanted)])
        kept = masks.sum((1, 2)) >= _MIN_VISIBLE * np.array(areas)
        return {
            "image_u8": image_u8,
            "masks": masks[kept],
            "labels": [label for label, keep in zip(labels, kept) if keep],
            "id": self.record_id(index),
        }

    def record_id(self, index: int) -> str:
        """The number of the scene."""
        return f"scene:{self.split}:{index}"


def make_source(**fields) -> Scenes:
    """For `type="demo_scenes"` in a config."""
    return Scenes(**fields)


@functools.cache
def cutouts(split: str) -> list[tuple[str, np.ndarray]]:
    """(label, uint8[H, W, 4] with a binary alpha) of every thing with a good mask."""
    found = []
    for photo in demo_annotations.load("all"):
        good = [thing for thing in photo["objects"] if thing.get("mask_quality") == "good"]
        for number, thing in enumerate(good):
            heldout = photo["split"] == "heldout"
            if photo["id"] == "coins":
                heldout = number >= len(good) - _HELDOUT_COINS
            if heldout == (split == "heldout"):
                alpha = demo_annotations.mask(photo, thing)
                rgba = np.dstack([photo["image_u8"], alpha.astype(np.uint8) * 255])
                ys, xs = np.nonzero(alpha)
                box = rgba[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
                found.append((thing["label"], box))
    return found


def _pick(split, rng) -> tuple[str, np.ndarray]:
    """Every label equally likely: otherwise most scenes would show coins."""
    by_label: dict[str, list[np.ndarray]] = {}
    for label, rgba in cutouts(split):
        by_label.setdefault(label, []).append(rgba)
    label = sorted(by_label)[int(rng.integers(len(by_label)))]
    return label, by_label[label][int(rng.integers(len(by_label[label])))]


def texture(
    split: str, size: int, rng: np.random.Generator, names: Sequence[str] = _TEXTURES
) -> np.ndarray:
    """A ground: a random square of the split's half of a texture, uint8[size, size, 3]."""
    name = names[int(rng.integers(len(names)))]
    whole = _load_texture(name)
    middle = whole.shape[1] // 2
    half = whole[:, middle:] if split == "heldout" else whole[:, :middle]
    return np.array(images.resize(images.random_crop(half, rng, min_side=2 * size), size))


@functools.cache
def _load_texture(name) -> np.ndarray:
    return images.decode(wheels.read("scikit-image", f"skimage/data/{name}.png"), name=name)


def _paste(image_u8, owner, rgba, number, rng) -> int:
    """Draws one cut-out in place; returns its pixels."""
    size = len(owner)
    side = rng.uniform(0.3, 0.65) * size  # of the longer side
    scale = side / max(rgba.shape[:2])
    height, width = (max(2, round(length * scale)) for length in rgba.shape[:2])
    if rng.random() < 0.5:
        rgba = rgba[:, ::-1]
    small = np.array(Image.fromarray(rgba).resize((width, height), Image.Resampling.LANCZOS))
    y, x = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
    inside = small[..., 3] >= 128
    image_u8[y : y + height, x : x + width][inside] = small[..., :3][inside]
    owner[y : y + height, x : x + width][inside] = number
    return int(inside.sum())
