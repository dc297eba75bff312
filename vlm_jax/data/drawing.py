r"""Annotations drawn as pictures: boxes, skeletons and masks out of a JSON file.

    drawing.load("instances.json:masks").draw(image_u8, "0001.jpg")      -> uint8[H, W, 3]

A drawing is called FILE:KIND[:BACKGROUND].

    kind        draws                                                     background
    boxes       outlines in the colour of the class                       image
    masks       filled polygons and RLE in the colour of the class        black
    keypoints   skeletons; limbs of 17 (COCO) or 18 (OpenPose) points     black
    openpose    the same, 17 points made 18 by a neck between the shoulders

Files: `data/annotations.py`. Colours are `PALETTE[label % 256]`, with label 256 starting again at
1: 0 is the background.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlm_jax import answer
from vlm_jax.data import annotations as annotations_lib
from vlm_jax.data import records

KINDS = {"boxes": "image", "masks": "black", "keypoints": "black", "openpose": "black"}


def _palette() -> np.ndarray:
    # Bits 0, 3, 6 of the index, from the top, make red; 1, 4, 7 green; 2, 5 blue: neighbours are
    # far apart and all 256 differ. The colour map of PASCAL VOC.
    index = np.arange(256)[:, None]
    channel = np.arange(3)
    bits = [((index >> (3 * k + channel)) & 1) << (7 - k) for k in range(3)]
    return np.sum(bits, axis=0).astype(np.uint8)


PALETTE = _palette()  # uint8[256, 3], entry 0 black. The palette of the paper was not released.

# OpenPose: 18 hues, 20 degrees apart; limb i and point i have colour i.
HUES = tuple(
    tuple(int(round(255 * min(1, max(0, abs((h / 60 + s) % 6 - 3) - 1)))) for s in (0, 4, 2))
    for h in range(0, 360, 20)
)
LIMBS = {  # number of points -> pairs of them
    17: (
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8),
        (7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    18: (
        (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12),
        (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
    ),
}  # fmt: skip
# Of COCO's 17 points, in the order of OpenPose; -1 is the neck.
_OPENPOSE = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Annotations of many images with the way to draw them.

    Attributes:
      kind, background: see the module.
      things: image name -> objects.
    """

    kind: str
    background: str
    things: Mapping[str, Sequence[annotations_lib.Thing]]

    def has(self, name: str) -> bool:
        """Whether this image has something to draw."""
        return any(thing.has(self.kind) for thing in self.things.get(name, ()))

    def draw(self, image_u8: np.ndarray, name: str) -> np.ndarray:
        """The picture, uint8 of the shape of the image.

        Raises:
          BadRecordError: an annotation that cannot be drawn.
        """
        canvas = np.zeros_like(image_u8) if self.background == "black" else image_u8
        things = [thing for thing in self.things[name] if thing.has(self.kind)]
        if problem := next((thing.problem for thing in things if thing.problem), ""):
            raise records.BadRecordError(f"{self.kind} of {name}: {problem}")
        painter = {"boxes": boxes, "masks": masks}.get(self.kind)
        try:
            if painter:
                return painter(canvas, things)
            points: list[Any] = [thing.keypoints for thing in things]
            if self.kind == "openpose":
                points = [to_openpose(p) if len(p) == 17 else p for p in points]
            return skeletons(canvas, points)
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise records.BadRecordError(f"{self.kind} of {name}: {error!s:.200}") from error


def load(call: str) -> Drawing:
    """The drawing called FILE:KIND[:BACKGROUND].

    Raises:
      DataError: no such kind, or a file that is not of a form in the module's docstring.
    """
    path, kind, background = split(call)
    return Drawing(kind, background, annotations_lib.load(path))


def split(call: str) -> tuple[str, str, str]:
    """File, kind and background of such a name."""
    parts = call.split(":")
    background = parts.pop() if len(parts) > 1 and parts[-1] in ("black", "image") else ""
    kind = parts.pop() if len(parts) > 1 else ""
    if kind not in KINDS:
        raise records.DataError(
            f"{call}: give annotations as a folder, or as FILE.json:KIND[:black|:image], KIND "
            f"being one of {', '.join(KINDS)}"
        )
    return ":".join(parts), kind, background or KINDS[kind]


def colour(label: int) -> tuple[int, int, int]:
    """Of a class; never black."""
    red, green, blue = PALETTE[(label - 1) % 255 + 1].tolist()
    return red, green, blue


def _line(image_u8: np.ndarray) -> int:
    """Width of lines: seen after the image has been reduced to a tokenizer's side."""
    return max(1, round(min(image_u8.shape[:2]) / 100))


def boxes(canvas_u8: np.ndarray, things: Sequence[annotations_lib.Thing]) -> np.ndarray:
    """Outlines, the largest first, so that none is hidden."""
    image = Image.fromarray(canvas_u8)
    pen = ImageDraw.Draw(image)
    for thing in sorted(things, key=lambda t: -_box_area(t.box)):
        x0, y0, x1, y1 = thing.box
        low, high = (min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))
        pen.rectangle([low, high], outline=colour(thing.label), width=_line(canvas_u8))
    return np.array(image)


def _box_area(box: Sequence[float]) -> float:
    return abs((box[2] - box[0]) * (box[3] - box[1]))


def masks(canvas_u8: np.ndarray, things: Sequence[annotations_lib.Thing]) -> np.ndarray:
    """Filled masks, the largest first."""
    height, width = canvas_u8.shape[:2]
    drawn = [(mask(thing, height, width), thing.label) for thing in things]
    result = canvas_u8.copy()
    for where, label in sorted(drawn, key=lambda pair: -int(pair[0].sum())):
        result[where] = colour(label)
    return result


def mask(thing: annotations_lib.Thing, height: int, width: int) -> np.ndarray:
    """bool[height, width] of its polygons, outlines included, and its RLE.

    Raises:
      ValueError: the RLE is of another size.
    """
    image = Image.new("1", (width, height))
    pen = ImageDraw.Draw(image)
    for polygon in thing.polygons:
        pen.polygon(list(zip(polygon[::2], polygon[1::2])), fill=1, outline=1)
    where = np.array(image)
    if thing.rle:
        if tuple(thing.rle["size"]) != (height, width):
            raise ValueError(f"RLE of size {thing.rle['size']}, image of {height}x{width}")
        where |= annotations_lib.decode_rle(thing.rle["counts"], height, width)
    return where


def skeletons(canvas_u8: np.ndarray, people: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """Limbs between visible points, then the points.

    Args:
      canvas_u8: to draw on.
      people: 17 or 18 (x, y, visible) each.

    Raises:
      ValueError: another number of points.
    """
    image = Image.fromarray(canvas_u8)
    pen, width = ImageDraw.Draw(image), 2 * _line(canvas_u8)
    for points in people:
        if len(points) not in LIMBS:
            raise ValueError(f"{len(points)} points; known are {', '.join(map(str, LIMBS))}")
        for number, (a, b) in enumerate(LIMBS[len(points)]):
            if points[a][2] > 0 and points[b][2] > 0:
                ends = [tuple(points[a][:2]), tuple(points[b][:2])]
                pen.line(ends, fill=HUES[number % 18], width=width)
        for number, (x, y, visible) in enumerate(points):
            if visible > 0:
                corners = [x - width, y - width, x + width, y + width]
                pen.ellipse(corners, fill=HUES[number % 18])
    return np.array(image)


def to_openpose(points: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """COCO's 17 points as OpenPose's 18; the neck is visible when both shoulders are."""
    left, right = points[5], points[6]
    neck = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2, min(left[2], right[2]))
    return [neck if source < 0 else tuple(points[source]) for source in _OPENPOSE]


def of_answer(image_u8: np.ndarray, said: answer.Answer) -> np.ndarray:
    """The image with what an answer shows: masks half covering, boxes, points, and their numbers.

    Returns:
      uint8 of the image's shape.
    """
    canvas = image_u8.astype(np.float32)
    for number, rle in enumerate(said.masks):
        where = annotations_lib.decode(rle)
        canvas[where] = 0.5 * canvas[where] + 0.5 * np.array(colour(number + 1), np.float32)
    image = Image.fromarray(np.round(canvas).astype(np.uint8))
    pen, width = ImageDraw.Draw(image), max(2, _line(image_u8))
    for number, (x0, y0, x1, y1) in enumerate(said.boxes_xyxy_px.tolist()):
        corners = [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
        pen.rectangle(corners, outline=colour(number + 1), width=width)
        pen.text((corners[0] + 2 * width, corners[1] + 2 * width), f"[{number}]", fill="white",
                 stroke_width=1, stroke_fill="black")  # fmt: skip
    for number, (x, y) in enumerate(said.points_xy_px.tolist()):
        around = [x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width]
        pen.ellipse(around, fill=colour(number + 1), outline="white")
    return np.array(image)
