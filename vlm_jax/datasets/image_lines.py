"""JSON lines that name the file of an image each, and places in texts about it."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

from vlm_jax.data import folders, image_files, records, shard_files, sources

LOCATION, IMAGE = "<at> <boxes>", "<image>"  # how models read a place, and the image
_PLACES = re.compile(r"\[(\s*\d+\s*(?:,\s*\d+\s*)*,?\s*)\]")


@dataclasses.dataclass
class ImageLines:
    """What sources of such lines share; they add `__getitem__`.

    Args:
      path: of the JSON lines; a file, glob, folder, or a list of these.
      root: folder that images start from; "" is that of the file.

    Raises:
      DataError: no such file.
    """

    path: Any
    root: str = ""

    def __post_init__(self):
        self._lines = sources.make_source("jsonl", path=self.path)
        first = shard_files.find_files(self.path)[0]
        self._root = pathlib.Path(self.root).expanduser() if self.root else first.parent

    @property
    def skipped(self) -> Any:
        """Lines that are no JSON."""
        return self._lines.skipped

    def __len__(self) -> int:
        return len(self._lines)

    def content(self, name: str) -> bytes:
        """The file of an image; BadRecordError where there is none."""
        return shard_files.read_bytes(folders.on_disk(self._root, name), image_files.MAX_BYTES)

    def line(self, index: int) -> records.Record:
        """The object of a line."""
        return self._lines[index]

    def record_id(self, index: int) -> str:
        """File and line."""
        return self._lines.record_id(index)

    def fingerprint(self) -> Any:
        """Of the lines."""
        return self._lines.fingerprint()


def named_places(text: str, count: int, where: str, things: str) -> tuple[str, list[int]]:
    """`[0]` and `[1, 2]` of a text as locations, and which places they are, in order.

    Args:
      text: of a person.
      count: places that are given.
      where, things: for messages: "in the question", "boxes".

    Raises:
      ValueError: a number without a place.
    """
    chosen: list[int] = []

    def location(found):
        numbers = [int(x) for x in found.group(1).split(",") if x.strip()]
        for number in numbers:
            if number >= count:
                raise ValueError(f"[{number}] {where}, and {count} {things}; they count from 0")
        chosen.extend(numbers)
        return " ".join([LOCATION] * len(numbers))

    return _PLACES.sub(location, text), chosen
