"""ArrayRecord files as one source, with a bounded number of them open."""

from __future__ import annotations

import bisect
import concurrent.futures
import itertools
import os
from collections.abc import Sequence
from typing import Any

from vlm_jax.data import file_kind, records, shard_files

_OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32_768}
_COUNTING = 16  # files opened at once to count their records; remote ones take a while each


class Contents(shard_files.Files):
    """The records of ArrayRecord files as they are stored, bytes.

    Args:
      path: see `shard_files.find_files`.
      ranges: of every file the first record and how many, as TFDS splits are given; None is all.

    Raises:
      DataError: no such file, or it is not ArrayRecord.
    """

    def __init__(
        self,
        path: str | os.PathLike | Sequence[str],
        ranges: Sequence[tuple[int, int]] | None = None,
    ):
        super().__init__(path)
        if ranges is None:
            with concurrent.futures.ThreadPoolExecutor(_COUNTING) as pool:
                ranges = [(0, count) for count in pool.map(_count, self.paths)]
        self._starts = [start for start, _ in ranges]
        self._ends = list(itertools.accumulate(count for _, count in ranges))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        file, place = self._locate(index)
        try:
            return _kept_open(*self._stamps[file]).read([place])[0]
        except records.DataError:
            raise
        except Exception as error:  # the reader raises bare RuntimeErrors and IndexErrors
            raise records.BadRecordError(f"{self.record_id(index)}: {error}") from error

    def record_id(self, index: int) -> str:
        """File, and the number in it."""
        file, place = self._locate(index)
        return f"{self.paths[file]}:{place}"

    def _locate(self, index: int) -> tuple[int, int]:
        index = range(len(self))[int(index)]
        file = bisect.bisect_right(self._ends, index)
        before = self._ends[file - 1] if file else 0
        return file, self._starts[file] + index - before


class ArrayRecord(Contents):
    """ArrayRecord files, one msgpack dict a record (or raw bytes).

    Args:
      path: see `shard_files.find_files`.
      decode: "msgpack", or "raw": the record is {"bytes": ...}.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str], decode: str = "msgpack"):
        if decode not in ("msgpack", "raw"):
            raise records.DataError(f"decode={decode!r} is not 'msgpack' or 'raw'")
        super().__init__(path)
        self._decode = decode

    def __getitem__(self, index: int) -> records.Record:
        content = super().__getitem__(index)
        return {"bytes": content} if self._decode == "raw" else records.unpack(content)


def _open(path: str | os.PathLike) -> Any:
    module = records.require("array_record.python.array_record_module")
    # The reader itself is silent about files that it cannot open.
    shard_files.open_file(path)
    return module.ArrayRecordReader(str(path), **_OPTIONS)


_kept_open = shard_files.Kept(lambda path, size, time_ns: _open(path))


def _count(path: os.PathLike) -> int:
    try:
        reader = _open(path)
        count = reader.num_records()
        if not reader.ok():
            raise ValueError("the file is damaged or cut off")
        return count
    except records.DataError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        if reason := file_kind.not_data(path):
            raise records.DataError(f"{path} {reason}") from error
        raise records.DataError(f"{path}: not ArrayRecord: {error}") from error
