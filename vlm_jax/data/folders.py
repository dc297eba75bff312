"""Folders of images, videos and frames as sorted lists of relative paths ("cat/12.jpg").

Sorting is natural: frame2 comes before frame10. Hidden files are left out, and so is what is no
file: pipes, sockets, devices, dangling links. Names need not be UTF-8: Python keeps other bytes as
lone surrogates. They are compared in Unicode's form NFC, because one system writes "é" as one
character and another as two.
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
import sys
import unicodedata
from collections.abc import Sequence

from vlm_jax.data import records

IMAGES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".jp2", ".avif", ".heic", ".heif",
)  # fmt: skip
VIDEOS = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv", ".3gp", ".ts",
    ".m2ts", ".mts", ".wmv", ".asf", ".flv", ".vob",
)  # fmt: skip


def list_files(root: str | os.PathLike, suffixes: Sequence[str] = IMAGES) -> list[str]:
    """Files below `root`, at any depth, whose name ends so; links to folders are followed.

    What is left out is counted on stderr.

    Raises:
      DataError: no such folder, or none of these files in it.
    """
    root = os.path.expanduser(os.fspath(root))
    if not os.path.isdir(root):
        raise records.DataError(f"{root}: no such folder")
    found: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    seen, pending = set(), [root]
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            continue
        seen.add(real)
        for entry in _entries(folder, others):
            if entry.is_dir():
                pending.append(entry.path)
            elif not entry.is_file():
                others["that are no files"] += 1
            elif entry.name.lower().endswith(tuple(suffixes)):
                found.append(pathlib.Path(entry.path).relative_to(root).as_posix())
            else:
                suffix = os.path.splitext(entry.name)[1].lower()
                others[suffix or "without a suffix"] += 1
    left_out = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
    if not found:
        also = f"; it holds {left_out}" if left_out else ""
        raise records.DataError(f"{root}: holds no file that ends with {', '.join(suffixes)}{also}")
    if left_out:
        print(f"vlm_jax: {root}: left out {left_out}", file=sys.stderr)
    return sorted(found, key=natural)


def _entries(folder: str, others: collections.Counter) -> list[os.DirEntry]:
    """What is in a folder and not hidden; a folder that may not be read is one of the others."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except PermissionError:
        others["folders that may not be read"] += 1
        return []


def canonical(name: str) -> str:
    """A name as names are compared."""
    return unicodedata.normalize("NFC", name)


def on_disk(folder: str | os.PathLike, name: str) -> str:
    """The path of a listed name, or of a file called the same in the other form of Unicode.

    Lists are written on one system and read on another.
    """
    forms = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    paths = [os.path.join(folder, form) for form in forms]
    return next(filter(os.path.lexists, paths), paths[0])


def natural(path: str) -> tuple:
    """Sorts folder by folder, numbers by their value."""
    parts = [
        # Only what the pattern found: "²".isdigit() is true, and int("²") fails.
        tuple((int(x), "") if x[0] in "0123456789" else (-1, x) for x in _NUMBER.split(part) if x)
        for part in canonical(path).split("/")
    ]
    return (parts, path)


_NUMBER = re.compile("([0-9]+)")


def by_folder(paths: Sequence[str]) -> dict[str, list[str]]:
    """Folder -> its files, both in the order given: frames of a clip, views of an object."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(os.path.dirname(path), []).append(path)
    return groups


def by_class(paths: Sequence[str]) -> dict[str, list[str]]:
    """First sub-folder -> all files below it.

    Raises:
      DataError: a file lies in no sub-folder.
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        name, slash, _ = path.partition("/")
        if not slash:
            raise records.DataError(f"{path}: has no class; put the images in one folder per class")
        groups.setdefault(canonical(name), []).append(path)
    return groups


def paired(roots: Sequence[str | os.PathLike], match: str = "stem") -> list[tuple[str, ...]]:
    """Images of several folders that belong together, by sorted order.

    Args:
      roots: folders; files of equal rank in the sorted lists are one tuple.
      match: "stem" also asks for equal names up to the suffix ("a/1.jpg" goes with "a/1.png" and
        "a/1.jpg.mask.png"); "order" trusts the order alone, as the reference does.

    Raises:
      DataError: another number of files, or names that do not agree; names the first.
    """
    if match not in ("stem", "order"):
        raise records.DataError(f"match={match!r} is not 'stem' or 'order'")
    lists = [list_files(root) for root in roots]
    first = lists[0]
    for root, other in zip(roots[1:], lists[1:]):
        for one, two in zip(first, other) if match == "stem" else ():
            if not _agree(one, two):
                raise records.DataError(
                    f"{roots[0]}/{one} and {root}/{two} stand at the same place of the sorted "
                    f"folders but are called differently; one of them has no partner"
                )
        if len(first) != len(other):
            longer, rest = (roots[0], first) if len(first) > len(other) else (root, other)
            extra = rest[min(len(first), len(other))]
            raise records.DataError(
                f"{roots[0]} holds {len(first)} images, {root} holds {len(other)}; the first "
                f"without a partner is {longer}/{extra}"
            )
    return list(zip(*lists))


def _agree(one: str, two: str) -> bool:
    one, two = (os.path.splitext(canonical(name))[0] for name in (one, two))
    return one == two or one.startswith(two + ".") or two.startswith(one + ".")
