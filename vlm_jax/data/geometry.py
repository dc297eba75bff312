"""From a picture to a canvas and back: images, boxes, points, masks.

A network sees a square. Two ways lead there, and they round differently:

    Square       the picture in the middle of the smallest square that holds it, then resized:
                 places are fractions of its side          (NExT-Chat: CLIP, boxes)
    Canvas       the picture resized to fit, then filled up          (SAM; NExT-Chat: masks)

Pixels of boxes and points are edges, not centres: x before y, the right and lower edge of a picture
of 60 x 44 pixels at 60 and 44. All of it is host code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlm_jax.data import images, records


@dataclasses.dataclass(frozen=True)
class Square:
    """The smallest square around a picture.

    Attributes:
      height, width: of the picture in pixels.
    """

    height: int
    width: int

    @property
    def side(self) -> int:
        """Of the square, in pixels of the picture."""
        return max(self.height, self.width)

    @property
    def offset_xy(self) -> np.ndarray:
        """float32[2], where the picture begins in it."""
        x, y = (self.side - self.width) // 2, (self.side - self.height) // 2
        return np.array([x, y], np.float32)

    def image(self, image_u8: np.ndarray, side: int, *, fill: int = 255) -> np.ndarray:
        """uint8[height, width, 3] -> [side, side, 3]; Pillow's bicubic."""
        return images.resize(images.pad_square(image_u8, fill), side)

    def points(self, points_px: np.ndarray) -> np.ndarray:
        """float[..., 2] in pixels of the picture -> float32 fractions of the square, in 0..1."""
        shifted = np.asarray(points_px, np.float32) + self.offset_xy
        return np.clip(shifted / np.float32(self.side), 0, 1).astype(np.float32)

    def points_px(self, points01: np.ndarray) -> np.ndarray:
        """Inverse of `points`; not clipped."""
        return np.asarray(points01, np.float32) * np.float32(self.side) - self.offset_xy

    def boxes(self, boxes_px: np.ndarray) -> np.ndarray:
        """float[..., 4] (x0, y0, x1, y1) in pixels of the picture -> float32, as `points`."""
        return _corners(self.points, boxes_px)

    def boxes_px(self, boxes01: np.ndarray) -> np.ndarray:
        """Inverse of `boxes`; not clipped."""
        return _corners(self.points_px, boxes01)

    def mask(self, logits_yx: np.ndarray) -> np.ndarray:
        """What a network says of each place of the square -> bool[height, width], above 0."""
        x, y = self.offset_xy.astype(int)
        whole = resize_bilinear(logits_yx, self.side, self.side)
        return whole[y : y + self.height, x : x + self.width] > 0


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture resized to fit into a square of another size.

    Attributes:
      height, width: of the picture in pixels.
      side: of the canvas.
      corner: the picture lies in the upper left corner (SAM), else in the middle (NExT-Chat).
    """

    height: int
    width: int
    side: int
    corner: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture there."""
        scale = self.side / max(self.height, self.width)
        return int(self.height * scale + 0.5), int(self.width * scale + 0.5)

    @property
    def place(self) -> np.ndarray:
        """int32[4]: x0, y0, x1, y1 of the picture there; elsewhere is nothing."""
        height, width = self.size
        x, y = (0, 0) if self.corner else ((self.side - width) // 2, (self.side - height) // 2)
        return np.array([x, y, x + width, y + height], np.int32)

    def image(self, image_u8: np.ndarray, *, fill: int = 0) -> np.ndarray:
        """uint8[height, width, 3] -> [side, side, 3]; Pillow's bilinear."""
        canvas = np.full((self.side, self.side, 3), fill, np.uint8)
        return self._put(canvas, image_u8)

    def mask(self, mask_yx: np.ndarray) -> np.ndarray:
        """bool[height, width] -> uint8[side, side] of 0 and 1, resized as the image is."""
        canvas = np.zeros((self.side, self.side), np.uint8)
        return self._put(canvas, np.asarray(mask_yx, bool).astype(np.uint8))

    def _put(self, canvas, pixels):
        x0, y0, x1, y1 = self.place
        resized = Image.fromarray(pixels).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        canvas[y0:y1, x0:x1] = np.array(resized)
        return canvas

    def points(self, points_px: np.ndarray) -> np.ndarray:
        """float[..., 2] in pixels of the picture -> float32 in pixels of the canvas."""
        return np.asarray(points_px, np.float32) * self._scale_xy() + self.place[:2]

    def points_px(self, points: np.ndarray) -> np.ndarray:
        """Inverse of `points`."""
        moved = np.asarray(points, np.float32) - self.place[:2].astype(np.float32)
        return (moved / self._scale_xy()).astype(np.float32)

    def boxes(self, boxes_px: np.ndarray) -> np.ndarray:
        """float[..., 4] in pixels of the picture -> float32 in pixels of the canvas."""
        return _corners(self.points, boxes_px)

    def boxes_px(self, boxes: np.ndarray) -> np.ndarray:
        """Inverse of `boxes`."""
        return _corners(self.points_px, boxes)

    def mask_px(self, logits_yx: np.ndarray) -> np.ndarray:
        """What a network says of each place of the canvas -> bool[height, width], above 0."""
        x0, y0, x1, y1 = self.place
        whole = resize_bilinear(logits_yx, self.side, self.side)
        return resize_bilinear(whole[y0:y1, x0:x1], self.height, self.width) > 0

    def _scale_xy(self):
        height, width = self.size
        return np.array([width / self.width, height / self.height], np.float32)


def _corners(move, boxes):
    boxes = np.asarray(boxes, np.float32)
    return move(boxes.reshape(*boxes.shape[:-1], 2, 2)).astype(np.float32).reshape(boxes.shape)


def resize_bilinear(x_yx: np.ndarray, height: int, width: int) -> np.ndarray:
    """float[Y, X] -> float32[height, width], between the centres of pixels, without smoothing.

    As torch's `interpolate(align_corners=False)`; Pillow smooths where it makes things smaller.
    """
    x_yx = np.asarray(x_yx, np.float32)
    for axis, size in ((0, height), (1, width)):
        old = x_yx.shape[axis]
        place = np.maximum((np.arange(size) + 0.5) * (old / size) - 0.5, 0).astype(np.float32)
        low = np.minimum(place.astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        share = np.expand_dims(place - low, 1 - axis).astype(np.float32)
        below, above = np.take(x_yx, low, axis), np.take(x_yx, high, axis)
        x_yx = below * (1 - share) + above * share
    return x_yx


def check_boxes(boxes_px: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Boxes in pixels as float32[K, 4], cut at the edges of their picture.

    Raises:
      BadRecordError: not four numbers each, not finite, corners the wrong way round, or a box that
        has no pixel in the picture; the message names the box.
    """
    try:
        boxes = np.asarray(boxes_px, np.float32).reshape(len(boxes_px), -1 if len(boxes_px) else 4)
    except (TypeError, ValueError) as error:
        raise records.BadRecordError(f"boxes are not four numbers each: {error}") from error
    if boxes.size and boxes.shape[1] != 4:
        raise records.BadRecordError(
            f"boxes have {boxes.shape[1]} numbers; they are x0, y0, x1, y1 in pixels"
        )
    boxes = boxes.reshape(-1, 4)
    limits = np.array([width, height, width, height], np.float32)
    cut = np.clip(boxes, 0, limits)
    for i, (box, inside) in enumerate(zip(boxes, cut)):
        if not np.all(np.isfinite(box)):
            problem = "is not finite"
        elif box[2] < box[0] or box[3] < box[1]:
            problem = "has its corners the wrong way round; x0 <= x1 and y0 <= y1"
        elif inside[2] <= inside[0] or inside[3] <= inside[1]:
            problem = f"has no pixel in its picture of {width}x{height}"
        else:
            continue
        raise records.BadRecordError(f"box {i}, {box.tolist()}, {problem}")
    return cut
