"""Folders of images, videos and frames as sorted lists of relative paths ("cat/12.jpg").

Sorting is natural: frame2 comes before frame10. Hidden files are left out.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence

from vlm_jax.data import records

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv", ".3gp")


def list_files(root: str | os.PathLike, suffixes: Sequence[str] = IMAGES) -> list[str]:
    """Files below `root`, at any depth, whose name ends so; links to folders are followed.

    Raises:
      DataError: no such folder, or none of these files in it.
    """
    root = os.path.expanduser(os.fspath(root))
    if not os.path.isdir(root):
        raise records.DataError(f"{root}: no such folder")
    found, seen = [], set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(tuple(suffixes)) and not name.startswith("."):
                found.append(pathlib.Path(folder, name).relative_to(root).as_posix())
    if not found:
        raise records.DataError(f"{root}: holds no file that ends with {', '.join(suffixes)}")
    return sorted(found, key=natural)


def natural(path: str) -> tuple:
    """Sorts folder by folder, numbers by their value."""
    parts = [
        tuple((int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"([0-9]+)", part) if x)
        for part in path.split("/")
    ]
    return (parts, path)


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
        groups.setdefault(name, []).append(path)
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
    one, two = os.path.splitext(one)[0], os.path.splitext(two)[0]
    return one == two or one.startswith(two + ".") or two.startswith(one + ".")
