"""Files of data sets: found by name, and read at any place with few of them open at once.

Sets come in tens of thousands of shards, and a process may open a thousand files or fewer. So the
files opened last stay open, whichever source they belong to, and the others are opened again when
they are needed.
"""

from __future__ import annotations

import errno
import glob
import os
import pathlib
import resource
import stat
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import records, sidecar

_MOST_OPEN = 512


def find_files(path: str | os.PathLike | Sequence[str]) -> list[pathlib.Path]:
    """The files that `path` means, sorted within each of its entries.

    Args:
      path: a file, a glob, a folder (all its files, not the hidden ones), or a list of these.

    Raises:
      DataError: an entry means no file, or something that is none, like a pipe.
    """
    entries = [path] if isinstance(path, str | os.PathLike) else list(path)
    found: list[pathlib.Path] = []
    for entry in entries:
        text = os.path.expanduser(os.fspath(entry))
        if os.path.isdir(text):
            text = os.path.join(glob.escape(text), "*")
        exists = os.path.isfile(text)
        files = [text] if exists else sorted(filter(os.path.isfile, glob.glob(text)))
        if not files:
            if os.path.exists(text):
                raise records.DataError(f"{entry}: is not a regular file")
            raise records.DataError(f"no such file: {entry}")
        found.extend(pathlib.Path(file) for file in files)
    if not found:
        raise records.DataError(f"no files given: path={path!r}")
    return found


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """All of one regular file.

    Args:
      path: of the file; a pipe or a device is refused, since it may have no end.
      most: bytes that are allowed.

    Raises:
      BadRecordError: it cannot be read or is larger.
    """
    descriptor = open_file(path)
    size = os.fstat(descriptor.number).st_size
    if size > most:
        raise records.BadRecordError(f"{path}: {size} bytes are over the limit of {most}")
    with open(descriptor.number, "rb", closefd=False) as stream:
        return stream.read(size)


def map_array(path: str | os.PathLike) -> np.ndarray:
    """The array of a .npy file, read where it lies.

    Raises:
      DataError: no such file, or no array in it.
    """
    try:
        open_file(path)  # a pipe has no end
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except records.DataError as error:
        raise records.DataError(str(error)) from error
    except Exception as error:  # headers of damaged files raise nearly every type there is
        raise records.DataError(f"{path}: not an array: {error!s:.200}") from error
    if not isinstance(array, np.ndarray):
        raise records.DataError(f"{path}: not one array; a .npy file is needed")
    return array.view(np.ndarray)  # np.memmap makes every slice slow


class Descriptor:
    """An open file, closed when nobody holds it any more.

    So a thread that still reads from a file keeps it open, and needs no lock against its closing.
    """

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        os.close(self.number)


def open_file(path: str | os.PathLike) -> Descriptor:
    """Opens a regular file for reading.

    Raises:
      BadRecordError: it is not there, not readable, or not a regular file.
      DataError: this process has too many open files.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write.
        opened = Descriptor(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        regular = stat.S_ISREG(os.fstat(opened.number).st_mode)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise records.DataError(
                f"{path}: {error.strerror}; raise the limit, for example with `ulimit -n 4096`"
            ) from error
        raise records.BadRecordError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise records.BadRecordError(f"{path!r}: cannot read: {error}") from error
    if not regular:
        raise records.BadRecordError(f"{path}: is not a regular file")
    return opened


class Kept:
    """The files opened last. Thread-safe; reading from one that is open takes no lock.

    Args:
      make: opens the file of (path, size, time of change), as `sidecar.fingerprint` gives them: a
        file that was replaced is opened anew. What it returns closes itself, as `Descriptor` does.
    """

    def __init__(self, make: Callable[[str, int, int], Any]):
        self._make, self._lock = make, threading.Lock()
        self._open: dict[tuple[str, int, int], Any] = {}  # oldest first

    def __call__(self, *stamp: Any) -> Any:
        """The open file; errors are those of `make`."""
        found = self._open.get(stamp)
        if found is None:
            found = self._make(*stamp)
            with self._lock:
                self._open[stamp] = found
                while len(self._open) > most_open():
                    del self._open[next(iter(self._open))]
        return found

    def __len__(self) -> int:
        return len(self._open)


def most_open() -> int:
    """How many files a `Kept` holds: an eighth of what this process may open.

    There is one for plain files and one for ArrayRecord; the rest is for checkpoints, event files,
    sockets and compilers.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_OPEN if limit == resource.RLIM_INFINITY else max(8, min(_MOST_OPEN, limit // 8))


def _open_unchanged(path: str, size: int, time_ns: int) -> Descriptor:
    del time_ns
    opened = open_file(path)
    now = os.fstat(opened.number).st_size
    if now != size:
        raise records.BadRecordError(
            f"{path}: {now} bytes, and {size} when it was indexed; the file was cut off or "
            "changed while in use"
        )
    return opened


_kept_open = Kept(_open_unchanged)


class Files:
    """What sources of several files share. Picklable: descriptors are no part of it.

    Attributes:
      paths: of the files.
      skipped: see `sources`.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str]):
        self.paths = find_files(path)
        self.skipped: list[tuple[str, str]] = []
        self._stamps = sidecar.fingerprint(self.paths)

    def fingerprint(self) -> Any:
        """Paths, sizes and times of change, as they were when the index was made."""
        return self._stamps

    def _read_at(self, file: int, offset: int, size: int) -> bytes:
        # pread has no shared position, so threads need no lock.
        opened = _kept_open(*self._stamps[file])
        try:
            content = os.pread(opened.number, size, offset)
        except OSError as error:
            raise records.BadRecordError(
                f"{self.paths[file]}: cannot read: {error.strerror}"
            ) from error
        if len(content) != size:
            raise records.BadRecordError(
                f"{self.paths[file]}: {len(content)} of {size} bytes at {offset}; "
                "the file was cut off or changed while in use"
            )
        return content
