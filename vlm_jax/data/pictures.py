"""Images that are named first and read later, so that whoever arranges them moves no pixels.

A `Picture` names an image: a file or one frame of a video, perhaps with annotations drawn instead
of its content, perhaps altered. Equal pictures are the same image. A `Reader` reads them at the
side of a tokenizer: decode, draw, resize, alter, in this order, as the reference does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from vlm_jax.data import drawing, images, video

Image = TypeVar("Image")  # an array, or a Picture


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image, not read yet.

    Attributes:
      path: of the file.
      frame: of a video; -1 when the file is a still image.
      drawn: (name of annotations in the Reader, name of the image in them); () is the image itself.
      edits: alterations in order, each (name, *numbers), see `edited`.
    """

    path: str
    frame: int = -1
    drawn: tuple[str, ...] = ()
    edits: tuple[tuple[str | int, ...], ...] = ()


def edited(image: Image, name: str, *numbers: int) -> Image:
    """The image, altered: uint8 arrays now, pictures when they are read.

    Args:
      image: uint8[H, W, 3] or a Picture.
      name, numbers: "grey", or "hide" with a seed, see `holes`.
    """
    if isinstance(image, Picture):
        return dataclasses.replace(image, edits=(*image.edits, (name, *numbers)))
    image_u8: Any = image
    edited_u8: Any = images.to_u8(_EDITS[name](images.to01(image_u8), *numbers))
    return edited_u8


def holes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """What inpainting hides, bool[height, width].

    With probability 0.3 one square of side [0.1, 0.5) of the image, anywhere; otherwise patches of
    an 8 x 8 grid, each kept with one probability that is uniform itself. At the reference's 256
    pixels: sides 25 ... 127, patches of 32 x 32. (paper, section 3; numbers: tokenizing scripts)
    """
    hidden = np.zeros((height, width), bool)
    if rng.random() < 0.3:
        short = min(height, width)
        side = int(rng.integers(int(0.1 * short), int(0.5 * short)))
        y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
        hidden[y : y + side, x : x + side] = True
        return hidden
    dropped = rng.random((8, 8)) >= rng.random()
    return dropped[np.arange(height)[:, None] * 8 // height, np.arange(width) * 8 // width]


def _hide(image01: np.ndarray, seed: int) -> np.ndarray:
    hidden = holes(np.random.default_rng(seed), *image01.shape[:2])
    return np.where(hidden[..., None], np.float32(0), image01)


_EDITS: dict[str, Callable[..., np.ndarray]] = {"grey": images.grey, "hide": _hide}


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads pictures.

    Attributes:
      side: pixels; images are stretched to a square of it.
      drawings: what `Picture.drawn` refers to.
    """

    side: int
    drawings: Mapping[str, drawing.Drawing] = dataclasses.field(default_factory=dict)

    def read(self, pictures: Sequence[Picture]) -> list[np.ndarray]:
        """Pictures of one file, which is opened once; float32[side, side, 3] in [0, 1] each.

        Stills are resized with antialiased bicubic, frames of videos with plain bilinear: so does
        the reference.

        Raises:
          BadRecordError: the file cannot be read, or ends before a frame; names it.
        """
        frames = sorted({picture.frame for picture in pictures} - {-1})
        path = pictures[0].path
        decoded = {}
        if frames:
            decoded = dict(zip(frames, video.read_at(path, frames, size=self.side)))
        if any(picture.frame < 0 for picture in pictures):
            decoded[-1] = images.decode(path)
        return [self._finish(picture, decoded[picture.frame]) for picture in pictures]

    def _finish(self, picture: Picture, image_u8: np.ndarray) -> np.ndarray:
        if picture.drawn:
            name, image_name = picture.drawn
            image_u8 = self.drawings[name].draw(image_u8, image_name)
        image01 = images.to01(images.resize(image_u8, self.side))
        for edit, *numbers in picture.edits:
            image01 = _EDITS[str(edit)](image01, *numbers)
        return image01
