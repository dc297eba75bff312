"""Somebody's own photos, and frames of their videos, with labels or captions where there are any.

A record is {"image_u8", "id", "name", "split"} and, as `own_files` finds them, "labels" (class
folder or table) or "captions" (table).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data import images, records, video
from vlm_jax.datasets import caption_shards, own_files

SPLITS = ("train", "heldout", "all")
_KEPT_BYTES = 2**30  # of small pictures, so that later epochs decode nothing


@dataclasses.dataclass(frozen=True)
class OwnPictures:
    """Random-access source of the pictures of a folder or table.

    Attributes:
      path: folder, or table; see `own_files`.
      split: "train", "heldout" or "all".
      heldout: share of the files that are held out, by a hash of their content.
      side: pixels of the shorter side of a record; larger pictures are made smaller, and kept in
        memory (about 1 GiB at most). 0 leaves them as they are, read anew every time.
      texts: only files with labels or captions.
      frames: of every video, evenly over its length; 0 leaves videos out.
      file_column, text_column: of a table; see `tables.read`.
    """

    path: str
    split: str = "all"
    heldout: float = 0.2
    side: int = 0
    texts: bool = False
    frames: int = 0
    file_column: str = ""
    text_column: str = ""

    def __post_init__(self):
        if self.split not in SPLITS:
            raise records.DataError(f"split={self.split!r} is none of {', '.join(SPLITS)}")
        if self.side < 0 or self.frames < 0:
            raise records.DataError(f"side={self.side} and frames={self.frames} cannot be negative")
        self._items  # noqa: B018 - a folder without pictures shows before anything expensive

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """Lines of the table that cannot be used."""
        return self._listing.bad if self.texts else ()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> records.Record:
        file, place = self._items[index]
        if index not in self._kept:
            image_u8 = self._read(file, place)
            if not self.side or len(self._kept) * 6 * self.side**2 > _KEPT_BYTES:
                return self._record(index, image_u8)
            self._kept[index] = image_u8
        return self._record(index, self._kept[index])

    def record_id(self, index: int) -> str:
        """Name in the folder; of a frame, with its place in the video."""
        file, place = self._items[index]
        return f"{file.name}#{place:.2f}" if file.is_video else file.name

    def fingerprint(self) -> Any:
        """The files and the choice."""
        names = [file.name for file, _ in self._items]
        return [dataclasses.asdict(self), names]

    def __getstate__(self) -> dict[str, Any]:
        return {key: x for key, x in self.__dict__.items() if key != "_kept"}

    def _record(self, index: int, image_u8: np.ndarray) -> records.Record:
        file, _ = self._items[index]
        texts = {}
        if file.labels:
            texts["labels"] = list(file.labels)
        elif file.captions:
            texts["captions"] = list(file.captions)
        return {
            "image_u8": image_u8,
            "id": self.record_id(index),
            "name": file.group,
            "split": self.split,
            **texts,
        }

    def _read(self, file: own_files.File, place: float) -> np.ndarray:
        path = self._listing.root / file.name
        if file.is_video:
            number = int(place * max(0, video.count_frames(path) - 1))
            (image_u8,) = video.read_at(path, [number])
        else:
            image_u8 = images.decode(path)
        return shrink(image_u8, self.side)

    @functools.cached_property
    def _kept(self) -> dict[int, np.ndarray]:
        return {}

    @functools.cached_property
    def _listing(self) -> own_files.Listing:
        return own_files.find(self.path, self.file_column, self.text_column)

    @functools.cached_property
    def _items(self) -> list[tuple[own_files.File, float]]:
        """Files of the split, videos several times with the place of a frame, 0 to 1."""
        listing = self._listing
        wanted = [
            file
            for file in listing.files
            if (self.frames or not file.is_video)
            and (not self.texts or file.labels or file.captions)
        ]
        if not wanted:
            raise records.DataError(_nothing(listing, self.texts))
        for note in listing.notes:
            own_files.say(f"{listing.root}: {note}")
        if left := len(listing.files) - len(wanted):
            own_files.say(
                f"{listing.root}: {left} of {len(listing.files)} files are of no use here"
            )
        if self.split != "all":
            chosen = dataclasses.replace(listing, files=tuple(wanted))
            held = own_files.heldout(chosen, self.heldout)
            wanted = [x for x, h in zip(wanted, held) if h == (self.split == "heldout")]
        items = []
        for file in wanted:
            count = self.frames if file.is_video else 1
            items += [(file, (i + 0.5) / count) for i in range(count)]
        return items


def shrink(image_u8: np.ndarray, side: int) -> np.ndarray:
    """The picture with a shorter side of `side` at most; 0 leaves it."""
    height, width = image_u8.shape[:2]
    short = min(height, width)
    if not side or short <= side:
        return image_u8
    size = tuple(max(1, round(n * side / short)) for n in (height, width))
    return images.resize(image_u8, size)


def _nothing(listing: own_files.Listing, texts: bool) -> str:
    place = pathlib.Path(listing.root)
    if not texts:
        return f"{place}: {len(listing.files)} files, all videos; set frames to use their frames"
    more = f"; of the table: {listing.bad[0][0]}: {listing.bad[0][1]}" if listing.bad else ""
    return (
        f"{place}: {len(listing.files)} files, none with a label or caption; put the photos into "
        f"folders named as their class, or add a table (columns file and label or caption){more}"
    )


def make_source(**fields) -> OwnPictures | caption_shards.CaptionShards:
    """For `type="own_pictures"` in a config; shards where `path` is what pack_captions wrote.

    Raises:
      DataError: see `OwnPictures` and `own_files`.
    """
    if not _is_packed(fields.get("path", "")):
        return OwnPictures(**fields)
    root = pathlib.Path(fields["path"]).expanduser()
    split = fields.get("split", "all")
    labels = root / "labels"
    return caption_shards.CaptionShards(
        [str(root / name) for name in (("train", "heldout") if split == "all" else (split,))],
        labels=str(labels) if labels.is_dir() else "",
    )


def _is_packed(path: str) -> bool:
    return bool(path) and any(pathlib.Path(path).expanduser().glob("train/*.tar"))
