"""A text file of pictures with class names, as NXTP lists ImageNet:

    train/n01440764/n01440764_10026.JPEG : tench, Tinca tinca

A path may hold colons: the last " : " counts.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from vlm_jax.data import folders, image_files, records, shard_files, sidecar, sources

_SEPARATOR = b" : "
_MAX_LINE = 2**16  # bytes


class ImageList:
    """Random-access source of {"image": encoded bytes, "class_names": str, "id"}.

    Lines that are not of this form are left out and listed in `skipped`.

    Args:
      path: of the list.
      root: folder that relative paths start from; "" is the list's own.

    Raises:
      DataError: no such file.
    """

    def __init__(self, path: str | os.PathLike, root: str = ""):
        (self._path,) = shard_files.find_files(path)
        self._root = pathlib.Path(root).expanduser() if root else self._path.parent
        index = sidecar.load("list-2", sidecar.fingerprint([self._path]), self._scan)
        self._places = index["places"]
        self.skipped = [
            (f"{self._path}:{line}", "no ' : ' between path and names, or too long")
            for line in index["bad"]
        ]
        self._content: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_content": None}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> records.Record:
        name, names = self._line(index)
        path = folders.on_disk(self._root, name)
        content = shard_files.read_bytes(path, image_files.MAX_BYTES)
        return {"image": content, "class_names": names, "id": self.record_id(index)}

    def record_id(self, index: int) -> str:
        """The path as it is listed."""
        return self._line(index)[0]

    def fingerprint(self) -> Any:
        """Of the list."""
        return sidecar.fingerprint([self._path])

    def _line(self, index: int) -> tuple[str, str]:
        if self._content is None:
            self._content = np.memmap(self._path, np.uint8, "r")
        start, stop = self._places[index]
        name, _, names = self._content[start:stop].tobytes().rpartition(_SEPARATOR)
        return os.fsdecode(name).strip(), names.decode(errors="replace").strip()

    def _scan(self) -> dict[str, np.ndarray]:
        places, bad, offset = [], [], 0
        with self._path.open("rb") as stream:
            for number, (line, size) in enumerate(sources.lines(stream, _MAX_LINE), 1):
                if line is not None and _SEPARATOR in line:
                    places.append((offset, offset + size))
                elif line is None or line.strip():
                    bad.append(number)
                offset += size
        return {
            "places": np.array(places, np.int64).reshape(-1, 2),
            "bad": np.array(bad, np.int64),
        }


def make_source(**fields) -> ImageList:
    """For `type="image_list"` in a config."""
    return ImageList(**fields)
