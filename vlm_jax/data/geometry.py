"""An image in a square: where its boxes, points and masks lie there, and the way back.

    square = geometry.Square(size=(480, 640))     height, width of the image as it was given
    square.boxes_in(boxes_xyxy_px)                fractions of the square's side
    square.boxes_out(boxes01)                     pixels of the image

The image lies in the middle; its longer side fills the square, and the shorter one begins
`(long - short) // 2` pixels in. CLIP's picture and SAM's (NExT-Chat pads SAM's on both sides, too)
have this one frame, up to a pixel. Boxes are x0, y0, x1, y1, edges and not centres of pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Square:
    """The square around an image.

    Attributes:
      size: height and width of the image in pixels.
    """

    size: tuple[int, int]

    @property
    def side(self) -> int:
        """Of the square, in pixels of the image."""
        return max(self.size)

    @property
    def offset(self) -> tuple[int, int]:
        """x and y of the image in the square, in its pixels."""
        height, width = self.size
        return (self.side - width) // 2, (self.side - height) // 2

    def boxes_in(self, boxes_px: Any) -> np.ndarray:
        """float32[K, 4] in pixels of the image -> in 0..1 of the square; what is outside is cut.

        Raises:
          ValueError: another shape, NaN, reversed corners, or a box that is all outside.
        """
        boxes = checked_boxes(boxes_px, self.size)
        x, y = self.offset
        return np.clip((boxes + np.array([x, y, x, y], np.float32)) / self.side, 0, 1).astype(
            np.float32
        )

    def boxes_out(self, boxes01: Any) -> np.ndarray:
        """float32[K, 4] in 0..1 of the square -> pixels of the image; may lie outside of it."""
        x, y = self.offset
        boxes = np.asarray(boxes01, np.float32).reshape(-1, 4)
        return boxes * np.float32(self.side) - np.array([x, y, x, y], np.float32)

    def points_in(self, points_px: Any) -> np.ndarray:
        """float32[..., 2] (x, y) in pixels of the image -> in 0..1 of the square; cut, too."""
        points = np.asarray(points_px, np.float32) + np.array(self.offset, np.float32)
        return np.clip(points / np.float32(self.side), 0, 1).astype(np.float32)

    def points_out(self, points01: Any) -> np.ndarray:
        """float32[..., 2] in 0..1 of the square -> pixels of the image."""
        points = np.asarray(points01, np.float32) * np.float32(self.side)
        return points - np.array(self.offset, np.float32)

    def image_in(self, image_u8: np.ndarray, side: int, fill: int = 255) -> np.ndarray:
        """uint8[side, side, 3]: padded, then resized (bicubic), as CLIP's picture of NExT-Chat."""
        x, y = self.offset
        canvas = Image.new("RGB", (self.side, self.side), (fill,) * 3)
        canvas.paste(Image.fromarray(image_u8), (x, y))
        return np.array(canvas.resize((side, side), Image.Resampling.BICUBIC))

    def canvas(self, image_u8: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
        """The image resized (bilinear) and put into the middle of a square, as for SAM.

        Returns:
          (uint8[side, side, 3], black around it; int32[4], x0 y0 x1 y1 of the image in it).
        """
        height, width = _fitted(self.size, side)
        small = np.array(
            Image.fromarray(image_u8).resize((width, height), Image.Resampling.BILINEAR)
        )
        left, top = (side - width) // 2, (side - height) // 2
        out = np.zeros((side, side, 3), np.uint8)
        out[top : top + height, left : left + width] = small
        return out, np.array([left, top, left + width, top + height], np.int32)

    def mask_in(self, mask_yx: np.ndarray, side: int) -> np.ndarray:
        """uint8[side, side] of 0 and 1: a mask of the image, as `canvas` places it.

        What is not 0 is inside: sums of polygons are 2 where they overlap.
        """
        height, width = _fitted(self.size, side)
        values = np.asarray(mask_yx, bool).astype(np.uint8)
        small = np.array(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))
        left, top = (side - width) // 2, (side - height) // 2
        out = np.zeros((side, side), np.uint8)
        out[top : top + height, left : left + width] = small
        return out

    def mask_out(self, logits_yx: np.ndarray) -> np.ndarray:
        """bool[H, W] of the image, from logits of the whole square of any side; above 0 is in."""
        x, y = self.offset
        height, width = self.size
        rows = _interpolation(len(logits_yx), self.side)[y : y + height]
        columns = _interpolation(len(logits_yx), self.side)[x : x + width]
        return rows @ np.asarray(logits_yx, np.float32) @ columns.T > 0


def enlarged(logits_yx: np.ndarray, side: int) -> np.ndarray:
    """float32[side, side] of logits of a square: bilinear, between the centres of pixels."""
    matrix = _interpolation(len(logits_yx), side)
    return matrix @ np.asarray(logits_yx, np.float32) @ matrix.T


def checked_boxes(boxes_px: Any, size: tuple[int, int]) -> np.ndarray:
    """float32[K, 4] of people, looked at.

    Args:
      boxes_px: x0, y0, x1, y1 of each, in pixels of an image.
      size: its height and width.

    Raises:
      ValueError: another shape, NaN or infinity, reversed corners, or a box that is all outside.
    """
    try:
        boxes = np.asarray(boxes_px, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"boxes {boxes_px!r:.60} are no numbers") from error
    if boxes.size == 0:
        return np.zeros((0, 4), np.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"boxes of shape {list(boxes.shape)}; a list of [x0, y0, x1, y1] in pixels is wanted"
        )
    height, width = size
    for number, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        what = f"box {number}, {_listed((x0, y0, x1, y1))},"
        if not np.isfinite([x0, y0, x1, y1]).all():
            raise ValueError(f"{what} has numbers that are not finite")
        if x1 < x0 or y1 < y0:
            raise ValueError(f"{what} ends before it begins; x0, y0, x1, y1 is the order")
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise ValueError(f"{what} is outside of the image of {width} x {height} pixels")
    return boxes


def _listed(box: Sequence[float]) -> list[float]:
    return [round(x, 2) for x in box]


def _interpolation(size: int, to: int) -> np.ndarray:
    """float32[to, size]: linear, between centres of pixels, without smoothing when it shrinks."""
    place = np.clip((np.arange(to) + 0.5) * size / to - 0.5, 0, size - 1)
    low = np.minimum(place.astype(int), max(size - 2, 0))
    matrix = np.zeros((to, size), np.float32)
    matrix[np.arange(to), low] = 1 - (place - low)
    if size > 1:
        matrix[np.arange(to), low + 1] = place - low
    return matrix


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width when the longer side is `side`; upstream: SAM's transforms."""
    scale = side / max(size)
    height, width = (int(x * scale + 0.5) for x in size)
    return max(1, height), max(1, width)
