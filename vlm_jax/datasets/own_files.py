"""A folder of somebody's own photos and videos: what is there, what it is called, what is held out.

    FOLDER/cat/1.jpg, FOLDER/dog/2.jpg   photos in class folders: the folder's name is the label
    FOLDER/*.jpg, FOLDER/captions.csv    photos and a table of captions or labels, see data/tables
    FOLDER/*.mp4                         videos, at any depth
    TABLE.csv, TABLE.jsonl               a table elsewhere; names start from its folder

All at once is fine. Folders named train, val, test, ... directly below FOLDER are not classes.

Held out are files whose content has a small hash, so that copies of a file stay on one side, and
files that come or go move no other. One file at least is held out, and one is not.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data import folders, records, sidecar, tables

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}


@dataclasses.dataclass(frozen=True)
class File:
    """One photo or video.

    Attributes:
      name: below the folder.
      group: name of its class folder, "" without.
      labels, captions: what is known about it.
    """

    name: str
    group: str = ""
    labels: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    @property
    def is_video(self) -> bool:
        """Whether it has frames."""
        return self.name.lower().endswith(folders.VIDEOS)


@dataclasses.dataclass(frozen=True)
class Listing:
    """What `find` found.

    Attributes:
      root: the folder.
      files: in natural order of their names.
      bad: (place, cause) of lines of the table that cannot be used: no such file, no text.
      notes: for people: what was taken for what, and what is left out.
      again: (place, cause) of lines of the table that repeat others; they do no harm.
    """

    root: pathlib.Path
    files: tuple[File, ...]
    bad: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    again: tuple[tuple[str, str], ...] = ()


def find(
    path: str | os.PathLike,
    file_column: str = "",
    text_column: str = "",
    *,
    table: str | os.PathLike = "",
) -> Listing:
    """Lists a folder, or the folder of a table; see the module.

    Args:
      path: of folder or table.
      file_column, text_column: see `tables.read`.
      table: for a folder, a table that lies elsewhere.

    Raises:
      DataError: nothing is there, or a table that cannot be read.
    """
    if not str(path):
        raise records.DataError("path is empty; name a folder of photos or videos, or a table")
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise records.DataError(f"{path}: no such folder or table")
    root = path if path.is_dir() else path.parent
    names = _pictures(root)
    groups, notes = _groups(names)
    file = table or (tables.find(root) if path.is_dir() else path)
    if not file:
        files = [
            File(name, group, tuple(tables.split_labels(group)))
            for name, group in zip(names, groups)
        ]
        return Listing(root, tuple(files), (), tuple(notes))
    content = tables.read(file, file_column, text_column)
    matched, bad = match(content, names)
    files = [
        File(name, group, tuple(entry.labels), tuple(entry.captions))
        if (entry := matched.get(name))
        else File(name, group)
        for name, group in zip(names, groups)
    ]
    if silent := sum(name not in matched for name in names):
        notes.append(f"{silent} of {len(names)} files are not in {content.path.name}")
    again = tuple((place, f"says of {file} what was said") for place, file in content.duplicates)
    if again:
        notes.append(f"{len(again)} lines of {content.path.name} say again what others said")
    return Listing(root, tuple(files), (*content.bad, *bad), tuple(notes), again)


def match(
    table: tables.Table, names: Sequence[str]
) -> tuple[dict[str, tables.Entry], list[tuple[str, str]]]:
    """Files of the entries of a table, and the entries without one as (place, cause).

    A name is a path from the folder, else the last part of one, else that without its suffix,
    where only one file is called so.
    """
    short: dict[str, list[str]] = {}
    for name in names:
        base = os.path.basename(name)
        for key in {base, os.path.splitext(base)[0]}:
            short.setdefault(folders.canonical(key), []).append(name)
    known, matched, bad = {folders.canonical(name): name for name in names}, {}, []
    for entry in table.entries:
        place = f"{table.path}:{entry.line}"
        file = folders.canonical(entry.file)
        found = [known[file]] if file in known else short.get(os.path.basename(file), [])
        if not found:
            bad.append((place, f"no file {entry.file}"))
        elif len(found) > 1:
            bad.append((place, f"{entry.file} could be {' or '.join(found[:3])}"))
        elif found[0] in matched:
            before = matched[found[0]]
            bad.append((place, f"{entry.file} is {found[0]}, which line {before.line} names"))
        else:
            matched[found[0]] = entry
    return matched, bad


def heldout(listing: Listing, fraction: float) -> np.ndarray:
    """Which of the files are held out, bool[n]; see the module.

    Raises:
      DataError: fewer than two files of different content, or a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise records.DataError(f"heldout={fraction} is not a share between 0 and 1")
    values = hashes(listing)
    if len(np.unique(values)) < 2:
        raise records.DataError(
            f"{listing.root}: {len(values)} files with {len(np.unique(values))} different contents "
            f"cannot be split; one to learn from and one to hold out are needed"
        )
    held = values < fraction
    if not held.any():
        held = values == values.min()
    elif held.all():
        held = values != values.max()
    return held


def say(message: str) -> None:
    """A line for people; each once per process."""
    _say(message)


@functools.cache
def _say(message: str) -> None:
    print(f"[own data] {message}", file=sys.stderr, flush=True)


def _pictures(root: pathlib.Path) -> list[str]:
    """Photos and videos; tables are not counted as left out."""
    names = folders.list_files(root, (*folders.IMAGES, *folders.VIDEOS, *tables.SUFFIXES))
    pictures = [name for name in names if not name.lower().endswith(tables.SUFFIXES)]
    if not pictures:
        raise records.DataError(f"{root}: holds {', '.join(names[:3])}, and no photo or video")
    return pictures


def _groups(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The class folder of every file, and what to say about it."""
    parts = [name.split("/")[:-1] for name in names]
    first = {part[0] for part in parts if part}
    if first and first <= {x for x in first if x.lower() in _SPLITS} and all(parts):
        note = f"{', '.join(sorted(first))} are taken for splits, not classes, and put together"
        return [part[1] if len(part) > 1 else "" for part in parts], [note]
    return [part[0] if part else "" for part in parts], []


def hashes(listing: Listing) -> np.ndarray:
    """Of the contents, float64[n] in [0, 1); equal for copies. Kept until a file changes."""
    paths = [listing.root / file.name for file in listing.files]
    try:
        key: Any = sidecar.fingerprint(paths)
    except OSError as error:
        raise records.DataError(f"{error.filename}: {error.strerror}") from error
    return sidecar.load("contents", key, lambda: {"hashes": _hash_all(paths)})["hashes"]


def _hash_all(paths: Sequence[pathlib.Path]) -> np.ndarray:
    values = []
    for path in paths:
        try:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise records.DataError(f"{path}: cannot read: {error.strerror}") from error
        values.append(int.from_bytes(found[:6], "big") / 2**48)
    return np.array(values, np.float64)
