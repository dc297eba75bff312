"""Scenes in two colours: one of the thing, one of the ground. For colouring by example.

A scene of `demo_scenes` keeps its light and loses its own colours. Scenes of one label share a
palette (a colour of the thing, one of the ground), so that grey scenes and their coloured versions
show what to do with one more: nothing but the examples says which colours are wanted.

    palettes   156: pairs of two different ones of 13 colours
    held out   26 of them; scenes are held out as in `demo_scenes`
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools

import numpy as np

from vlm_jax.data import images, records
from vlm_jax.datasets import demo_scenes

# Twelve hues and none; float32[13, 3].
COLOURS = np.array(
    [*(colorsys.hsv_to_rgb(i / 12, 0.8, 1.0) for i in range(12)), (0.9, 0.9, 0.9)], np.float32
)
_FLOOR, _GAIN = 0.15, 0.85  # light of black and range up to white: colours show in the dark too


@functools.cache
def palettes(split: str) -> np.ndarray:
    """int[n, 2], (colour of the thing, of the ground) of every palette of "train" or "heldout"."""
    found = [
        (thing, ground)
        for thing in range(len(COLOURS))
        for ground in range(len(COLOURS))
        if thing != ground and ((thing - ground) % 13 in (3, 8)) == (split == "heldout")
    ]
    return np.array(found)


def paint(image01, inside, thing_rgb, ground_rgb):
    """The scene in two colours; numpy or jax arrays alike.

    Args:
      image01: float[..., H, W, 3].
      inside: bool or 0/1 [..., H, W], where the thing is.
      thing_rgb, ground_rgb: float[3], a row of COLOURS.

    Returns:
      float[..., H, W, 3] in [0, 1].
    """
    light = (image01 @ np.array(images.GREY_WEIGHTS, np.float32))[..., None]
    inside = 1.0 * inside[..., None]
    return (_FLOOR + _GAIN * light) * (inside * thing_rgb + (1 - inside) * ground_rgb)


@dataclasses.dataclass(frozen=True)
class PaletteScenes:
    """Random-access source of `image_u8`, with `labels`: the palette of every scene.

    Args:
      split: "train" or "heldout", of scenes and palettes.
      count: number of scenes.
      size: side in pixels.
      per_palette: neighbouring scenes that share a palette.
      seed: of everything random.
    """

    split: str = "train"
    count: int = 1000
    size: int = 64
    per_palette: int = 8
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> records.Record:
        """image_u8 uint8[S, S, 3], label, id."""
        scene = self._scenes[index]
        label = int(self.labels[index])
        thing, ground = COLOURS[palettes(self.split)[label]]
        inside = scene["masks"].any(axis=0)
        painted01 = paint(images.to01(scene["image_u8"]), inside, thing, ground)
        return {"image_u8": images.to_u8(painted01), "label": label, "id": scene["id"]}

    def record_id(self, index: int) -> str:
        """That of the scene."""
        return self._scenes.record_id(index)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int64[count], the palette of every scene."""
        groups = -(-self.count // self.per_palette)
        rng = np.random.default_rng([self.seed, self.split == "heldout"])
        every = rng.permutation(len(palettes(self.split)))
        return np.repeat(np.resize(every, groups), self.per_palette)[: self.count]

    @functools.cached_property
    def _scenes(self) -> demo_scenes.Scenes:
        return demo_scenes.Scenes(self.split, count=self.count, size=self.size, seed=self.seed)


def make_source(**fields) -> PaletteScenes:
    """For `type="palette_scenes"` in a config."""
    return PaletteScenes(**fields)
