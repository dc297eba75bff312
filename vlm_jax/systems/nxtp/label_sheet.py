"""Photos with their labels beneath, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RIGHT, OTHER, TRUTH = "#16793c", "#222222", "#707070"
_GAP, _FONT = 8, 13
CELL = 192  # pixels


class Entry(NamedTuple):
    """One photo.

    Attributes:
      image_u8: uint8[H, W, 3], any size.
      labels: predicted, best first, with their scores.
      references: what is in it; () when that is not known.
    """

    image_u8: np.ndarray
    labels: Sequence[tuple[str, float]]
    references: Sequence[str] = ()


def thumbnail(image_u8: np.ndarray, cell: int = CELL) -> np.ndarray:
    """The photo as the sheet shows it: its longer side is `cell`."""
    photo = Image.fromarray(image_u8)
    scale = cell / max(photo.size)
    size = tuple(max(1, round(side * scale)) for side in photo.size)
    return np.array(photo.resize(size, Image.Resampling.LANCZOS))


def draw(
    entries: Sequence[Entry], *, columns: int = 4, cell: int = CELL, shown: int = 10
) -> np.ndarray:
    """A sheet: each photo, then its ranked labels, then the true ones in grey.

    A predicted label that is literally among the references is green.

    Args:
      entries: the photos; at least one.
      columns: photos beside each other. cell: side of a photo in pixels.
      shown: labels per photo.

    Returns:
      uint8[H, W, 3].
    """
    font = ImageFont.load_default(_FONT)
    line_height = _FONT + 4
    texts = [_lines(entry, font, cell, shown) for entry in entries]
    rows = [range(i, min(i + columns, len(entries))) for i in range(0, len(entries), columns)]
    heights = [cell + line_height * max(len(texts[i]) for i in row) + 2 * _GAP for row in rows]
    width = _GAP + min(columns, len(entries)) * (cell + _GAP)
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    top = _GAP
    for row, height in zip(rows, heights):
        for place, index in enumerate(row):
            left = _GAP + place * (cell + _GAP)
            photo = Image.fromarray(thumbnail(entries[index].image_u8, cell))
            corner = (left + (cell - photo.width) // 2, top + (cell - photo.height) // 2)
            sheet.paste(photo, corner)
            for number, (name, score, colour) in enumerate(texts[index]):
                y = top + cell + 2 + number * line_height
                pen.text((left, y), name, colour, font)
                pen.text((left + cell, y), score, colour, font, anchor="ra")
        top += height
    return np.array(sheet)


def _lines(entry: Entry, font, width: int, shown: int) -> list[tuple[str, str, str]]:
    lines = []
    for name, score in entry.labels[:shown]:
        text = f"{score:.3f}"
        room = width - font.getlength(text) - _GAP
        colour = RIGHT if name in entry.references else OTHER
        lines.append((_cut(name, font, room), text, colour))
    if entry.references:
        truth = _cut("true: " + ", ".join(entry.references), font, width)
        lines.append((truth, "", TRUTH))
    return lines


def _cut(text: str, font, width: float) -> str:
    # The font measures one line, of which a cell shows a few dozen letters.
    text = " ".join(text[: 8 * int(max(1, width))].split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
