"""What a command works on: files, folders, globs, lists and standard input as one list of names."""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import BinaryIO

from vlm_jax.data import folders, records, web

_MAX_PART = 200  # bytes of a name; file systems allow 255


def find(
    values: Sequence[str],
    suffixes: Sequence[str] = folders.IMAGES,
    *,
    stdin: BinaryIO | None = None,
) -> list[str]:
    """Paths and URLs, each once, in the order given; folders and globs in natural order.

    Args:
      values: each a file or URL (read later, also when it does not exist), a folder (all files of
        these suffixes, at any depth), a glob ("**" is any depth), "@FILE" (a path per line, from
        the folder of the file) or "-" (a path per line of standard input).
      suffixes: of the files in folders.
      stdin: instead of standard input.

    Raises:
      DataError: a folder or glob without such files, a list that cannot be read, or nothing at all.
    """
    found: dict[str, None] = {}
    for value in values:
        found.update(dict.fromkeys(_of(value, suffixes, stdin)))
    if not found:
        raise records.DataError(f"{', '.join(values) or 'no inputs'}: names no file")
    return list(found)


def _of(value: str, suffixes: Sequence[str], stdin: BinaryIO | None) -> list[str]:
    path = os.path.expanduser(value)
    if value == "-":
        return _lines((stdin or sys.stdin.buffer).read(), "standard input")
    if value.startswith("@") and not os.path.exists(value):
        file = pathlib.Path(value[1:]).expanduser()
        try:
            listed = _lines(file.read_bytes(), value)
        except OSError as error:
            raise records.DataError(f"{value}: cannot read: {error.strerror}") from error
        return [name if web.is_url(name) else folders.on_disk(file.parent, name) for name in listed]
    if os.path.isdir(path):
        return [os.path.join(path, name) for name in folders.list_files(path, suffixes)]
    if web.is_url(value) or os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    matched = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
    if not matched:
        raise records.DataError(f"{value}: no file matches")
    return sorted(matched, key=folders.natural)


def _lines(content: bytes, name: str) -> list[str]:
    if content.startswith(records.UTF_16):
        raise records.DataError(f"{name}: is UTF-16, not UTF-8; save it as UTF-8")
    content = content.removeprefix(codecs.BOM_UTF8)
    lines = (os.fsdecode(line).strip() for line in content.splitlines())
    return [line for line in lines if line]


def output_names(names: Sequence[str]) -> dict[str, str]:
    """A name for what is made of each input, relative, without suffix; no two are equal.

    Folders below the one that all inputs share are kept. Inputs that differ in their suffix alone
    keep it ("a.jpg", "a.png").
    """
    whole = {name: _as_path(name) for name in names}
    top = os.path.commonpath([os.path.dirname(path) for path in whole.values()])
    below = {name: os.path.relpath(path, top) for name, path in whole.items()}
    count: dict[str, int] = {}
    for path in below.values():
        for key in {path, os.path.splitext(path)[0]}:
            count[key] = count.get(key, 0) + 1
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name, path in below.items():
        short = os.path.splitext(path)[0]
        wanted = unique = "/".join(map(_part, (short if count[short] == 1 else path).split("/")))
        number = 1
        while unique in taken:  # the same path on http and https, "a" and "./a"
            number += 1
            unique = f"{wanted}-{number}"
        taken.add(unique)
        found[name] = unique
    return found


def _part(part: str) -> str:
    """A part of a path as a file system takes it, with room for a suffix."""
    content = part.replace("\0", "_").encode(errors="surrogatepass")
    if len(content) > _MAX_PART:
        part = f"{part[: _MAX_PART // 8]}-{hashlib.sha256(content).hexdigest()[:16]}"
    try:
        os.fsencode(part)
    except UnicodeEncodeError:  # a lone surrogate that is no byte of a name
        part = part.encode(errors="backslashreplace").decode()
    return part.replace("\0", "_")


def _as_path(name: str) -> str:
    if web.is_url(name):
        return "/" + name.partition("://")[2].replace("?", "_").strip("/").replace("..", "_")
    return os.path.abspath(name)


def processes(num_processes: int = 0, process_id: int = -1) -> tuple[int, int]:
    """How many share the work and which is this: as given, else SLURM's or MPI's, else (1, 0).

    Raises:
      ValueError: one of the two alone, or an id out of range.
    """
    if num_processes or process_id >= 0:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ValueError(
                f"--num_processes={num_processes} and --process_id={process_id}: give both, the "
                f"id from 0 to below the number"
            )
        return num_processes, process_id
    for count, rank in (
        ("SLURM_NTASKS", "SLURM_PROCID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("PMI_SIZE", "PMI_RANK"),
    ):
        if os.environ.get(count) and os.environ.get(rank):
            return int(os.environ[count]), int(os.environ[rank])
    return 1, 0
