"""Files of records as random-access sources.

    type           fields                                   record
    array_record   path, decode="msgpack"|"raw"             the dict, or {"bytes": ...}
    jsonl          path                                     the object of the line
    tar            path, members=()                         one key per extension: {"jpg": bytes,
                                                            "txt": str, "json": ..., "cls": int}
    tfds           name, split, data_dir, builder_kwargs    as TFDS decodes it; no TensorFlow
    memory         records                                  as given
    <module>       whatever its make_source takes           of vlm_jax/datasets, or a dotted name

`path` is a file, a glob, a folder (all its files) or a list of these. Every source has

    len(source)            usable records
    source[i]              the record; BadRecordError when it cannot be read
    source.record_id(i)    "file.jsonl:17", for messages
    source.skipped         records left out when the index was made, as (id, cause)
    source.fingerprint()   JSON-like; changes when the content may have changed

and is picklable: files are opened where they are read. It may have

    source.read_many(i)    the records at int64[n], or the BadRecordError of each that has one,
                           where that is faster than one by one
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vlm_jax.data import array_records, file_kind, records, shard_files, sidecar, tar_index

MAX_LINE = 16 * 2**20  # bytes; a longer line is left out, not read
_MAX_BAD = 100_000  # lines that are named, where there are not more good ones


class Source(Protocol):
    """See the module's docstring."""

    skipped: Sequence[tuple[str, str]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> records.Record: ...

    def record_id(self, index: int) -> str:
        """How messages call the record."""

    def fingerprint(self) -> Any:
        """Identifies the content for caches of derived values."""


def make_source(type: str, form: str | None = None, **fields: Any) -> Source:
    """The source of one entry of a mixture.

    Args:
      type: see `TYPES`; else a module of `vlm_jax.datasets`, or a dotted name.
      form: what is to be made of its records: their field "form". A corpus whose `make_source`
        takes `form` hears of it too, and may give other records.
      **fields: of the source.

    Raises:
      DataError: unknown type or field, or no such file.
    """
    if form is None:
        return _make(type, fields)
    return _Formed(_make(type, fields, form), form)


def _make(type: str, fields: dict[str, Any], form: str | None = None) -> Source:
    try:
        if type in TYPES:
            return TYPES[type](**fields)
        name = type if "." in type else f"vlm_jax.datasets.{type}"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            raise records.DataError(
                f"no data source type {type!r}; known: {', '.join(TYPES)}, a module of "
                f"vlm_jax.datasets, or a dotted name"
            ) from None
        if form is not None and "form" in inspect.signature(module.make_source).parameters:
            fields = {**fields, "form": form}
        return module.make_source(**fields)
    except TypeError as error:
        raise records.DataError(f"data source of type {type!r}: {error}") from error


class _Formed:
    """Records of another source, told in one form."""

    def __init__(self, source: Source, form: str):
        self._source, self._form = source, form

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> records.Record:
        return {**self._source[index], "form": self._form}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pickle asks before there is a source
            raise AttributeError(name)
        found = getattr(self._source, name)
        return self._formed if name == "read_many" else found

    def _formed(self, indices: Any) -> list[Any]:
        found = self._source.read_many(indices)  # type: ignore[attr-defined]
        return [
            x if isinstance(x, records.BadRecordError) else {**x, "form": self._form} for x in found
        ]

    def fingerprint(self) -> Any:
        """Of the records as they are told: lengths may depend on it. None where unknown."""
        inner = getattr(self._source, "fingerprint", lambda: None)()
        return None if inner is None else [inner, self._form]


class Memory:
    """Records of a list.

    Args:
      records: as they are given out.
    """

    skipped: Sequence[tuple[str, str]] = ()

    def __init__(self, records: Sequence[records.Record]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> records.Record:
        return self._records[index]

    def record_id(self, index: int) -> str:
        """The record's "id", or its number."""
        return str(self._records[index].get("id", f"memory:{index}"))

    def fingerprint(self) -> None:
        """None: derived values are not kept."""


class JsonLines(shard_files.Files):
    """One JSON object a line. The index of byte offsets is made once per content of the file.

    Lines that are not a JSON object are left out and listed in `skipped`; empty lines are ignored.

    Args:
      path: see the module.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str]):
        super().__init__(path)
        tables = []
        for number, (file, stamp) in enumerate(zip(self.paths, self._stamps)):
            index = sidecar.load("jsonl-3", [stamp], functools.partial(_scan, file))
            tables.append(np.insert(index["lines"], 0, number, axis=1))
            for line, cause in zip(index["bad_lines"], index["bad_causes"]):
                self.skipped.append((f"{file}:{line}", str(cause)))
        # [records, (file, line number from 1, offset, size)]
        self._table = np.concatenate(tables)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> records.Record:
        file, _, offset, size = map(int, self._table[index])
        content = self._read_at(file, offset, size)
        try:
            return _parse(content)
        except ValueError as error:
            raise records.BadRecordError(f"{error}; the file changed while in use") from error

    def record_id(self, index: int) -> str:
        """File and line, from 1."""
        file, line = map(int, self._table[index, :2])
        return f"{self.paths[file]}:{line}"


def lines(stream: io.BufferedIOBase, most: int = MAX_LINE) -> Iterator[tuple[bytes | None, int]]:
    """(line, its size) of every line; None for the content of one over `most` bytes."""
    while line := stream.readline(most):
        size = len(line)
        if size == most and not line.endswith(b"\n"):
            while rest := stream.readline(most):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield (None if size > most else line), size
        else:
            yield line, size


def _parse(line: bytes) -> records.Record:
    record = records.parse_json(line)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _scan(path: pathlib.Path) -> dict[str, np.ndarray]:
    found, bad_lines, bad_causes, offset = [], [], [], 0
    with path.open("rb") as stream:
        if stream.peek(2)[:2] in records.UTF_16:
            raise records.DataError(f"{path}: is UTF-16, not UTF-8; save it as UTF-8")
        for number, (line, size) in enumerate(lines(stream), 1):
            try:
                if line is None:
                    raise ValueError(f"{size} bytes; at most {MAX_LINE} are read")
                if line.strip():
                    _parse(line)
                    found.append((number, offset, size))
            except ValueError as error:
                bad_lines.append(number)
                bad_causes.append(str(error)[:200])
                if len(bad_lines) > max(_MAX_BAD, len(found)):
                    raise records.DataError(
                        f"{path}: {len(bad_lines)} of the first {number} lines are no JSON "
                        f"objects, the first is line {bad_lines[0]}: {bad_causes[0]}"
                    ) from error
            offset += size
    if bad_lines and not found and (reason := file_kind.not_data(path)):
        raise records.DataError(f"{path} {reason}")
    return {
        "lines": np.array(found, np.int64).reshape(-1, 3),
        "bad_lines": np.array(bad_lines, np.int64),
        "bad_causes": np.array(bad_causes, np.str_),
    }


class TarShards(shard_files.Files):
    """Tar files whose members are grouped by name up to the first dot, as WebDataset writes them.

    Members are read in place and never extracted; anything but regular files (links, devices) is
    left out and listed in `skipped`, and so are names that occur twice in a shard.

    Args:
      path: see the module.
      members: extensions that are read; () is all. The others are not touched.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str], members: Sequence[str] = ()):
        super().__init__(path)
        self._wanted = frozenset(members)
        self._codes: dict[str, int] = {}
        # Flat arrays: a third of the memory of dicts, and there are sets of 70 million records.
        tables = [self._table(number) for number in range(len(self.paths))]
        self._files, self._num_members, self._key_sizes, self._members = (
            np.concatenate(column) for column in list(zip(*tables))[:4]
        )
        self._keys = b"".join(table[4] for table in tables)
        self._first = np.cumsum(self._num_members) - self._num_members
        self._key_ends = np.cumsum(self._key_sizes)
        self._extensions = list(self._codes)

    def _table(self, number: int) -> tuple[Any, ...]:
        """Of one shard: per record (file, members, bytes of the key); members; keys."""
        file = self.paths[number]
        index = sidecar.load("tar-2", [self._stamps[number]], lambda: tar_index.scan(file))
        left_out = zip(index["bad_names"], index["bad_causes"])
        self.skipped += [(f"{file}:{name}", str(cause)) for name, cause in left_out]
        groups = tar_index.samples(index)
        keys = [key.encode(errors="surrogateescape") for key in groups]
        members = [
            (self._codes.setdefault(extension, len(self._codes)), *place)
            for group in groups.values()
            for extension, place in group.items()
        ]
        return (
            np.full(len(groups), number, np.int32),
            np.array([len(group) for group in groups.values()], np.int64),
            np.array([len(key) for key in keys], np.int64),
            np.array(members, np.int64).reshape(-1, 3),
            b"".join(keys),
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> records.Record:
        index = range(len(self))[index]
        file, first = int(self._files[index]), int(self._first[index])
        record: records.Record = {"id": self.record_id(index)}
        for code, offset, size in self._members[first : first + self._num_members[index]].tolist():
            extension = self._extensions[code]
            if self._wanted and extension not in self._wanted:
                continue
            content = self._read_at(file, offset, size)
            try:
                record[extension] = _TAR_VALUES.get(extension, bytes)(content)
            except ValueError as error:
                raise records.BadRecordError(
                    f"{self.record_id(index)}.{extension}: {error}"
                ) from error
        return record

    def record_id(self, index: int) -> str:
        """Shard and key."""
        index = range(len(self))[index]
        end = int(self._key_ends[index])
        key = self._keys[end - int(self._key_sizes[index]) : end].decode(errors="surrogateescape")
        return f"{self.paths[int(self._files[index])]}:{key}"


_TAR_VALUES: dict[str, Callable[[bytes], Any]] = {
    "json": records.parse_json,
    "txt": lambda content: content.decode(),
    "cls": int,
}


class Tfds:
    """A prepared TensorFlow Datasets data set in ArrayRecord format, read without TensorFlow.

    Args:
      name, split: as TFDS calls them.
      data_dir: where it was prepared; None is TFDS's own place.
      builder_kwargs: of the builder.
    """

    skipped: Sequence[tuple[str, str]] = ()

    def __init__(
        self,
        name: str,
        split: str = "train",
        data_dir: str | None = None,
        builder_kwargs: Mapping[str, Any] | None = None,
    ):
        tfds = records.require("tensorflow_datasets")
        self._name, self._split = name, split
        try:
            self._source = tfds.data_source(
                name,
                split=split,
                data_dir=data_dir,
                download=False,
                builder_kwargs=dict(builder_kwargs or {}) or None,
            )
            # Its own reader keeps every shard open for good; sets have thousands.
            base = records.require("tensorflow_datasets.core.data_sources.base")
            pieces = base.file_instructions(self._source.dataset_info, split)
            self._source.data_source = array_records.Contents(
                [os.fspath(piece.filename) for piece in pieces],
                [(piece.skip, piece.take) for piece in pieces],
            )
        except Exception as error:
            raise records.DataError(
                f"TFDS {name!r}, split {split!r}, data_dir={data_dir!r}: {error}\n"
                "Remedy: prepare it once in ArrayRecord format (file_format='array_record')."
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> records.Record:
        try:
            return self._source[int(index)]
        except records.DataError:
            raise
        except Exception as error:  # features decode with libraries of their own
            raise records.BadRecordError(f"{type(error).__name__}: {error}") from error

    def record_id(self, index: int) -> str:
        """Name, split and number."""
        return f"{self._name}/{self._split}:{index}"

    def fingerprint(self) -> Any:
        """Name, split and length."""
        return [self._name, self._split, len(self)]


TYPES = {
    "array_record": array_records.ArrayRecord,
    "jsonl": JsonLines,
    "tar": TarShards,
    "tfds": Tfds,
    "memory": Memory,
}
