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

and is picklable: files are opened where they are read.
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import pathlib
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vlm_jax.data import records, sidecar


class Source(Protocol):
    """See the module's docstring."""

    skipped: Sequence[tuple[str, str]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> records.Record: ...

    def record_id(self, index: int) -> str:
        """How messages call the record."""

    def fingerprint(self) -> Any:
        """Identifies the content for caches of derived values."""


def make_source(type: str, **fields: Any) -> Source:
    """The source of one entry of a mixture.

    Raises:
      DataError: unknown type or field, or no such file.
    """
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
        return module.make_source(**fields)
    except TypeError as error:
        raise records.DataError(f"data source of type {type!r}: {error}") from error


def find_files(path: str | os.PathLike | Sequence[str]) -> list[pathlib.Path]:
    """The files that `path` means, sorted within each of its entries.

    Raises:
      DataError: an entry means no file.
    """
    entries = [path] if isinstance(path, str | os.PathLike) else list(path)
    found = []
    for entry in entries:
        text = os.path.expanduser(os.fspath(entry))
        if os.path.isdir(text):
            text = os.path.join(glob.escape(text), "*")
        exists = os.path.isfile(text)
        files = [text] if exists else sorted(filter(os.path.isfile, glob.glob(text)))
        if not files:
            raise records.DataError(f"no such file: {entry}")
        found.extend(pathlib.Path(file) for file in files)
    if not found:
        raise records.DataError(f"no files given: path={path!r}")
    return found


class Memory:
    """Records of a list."""

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


class _Files:
    """What sources of several files share: lazily opened descriptors, read at an offset."""

    def __init__(self, path: str | os.PathLike | Sequence[str]):
        self.paths = find_files(path)
        self.skipped: list[tuple[str, str]] = []
        self._descriptors: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self):
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)

    def fingerprint(self) -> Any:
        """Paths, sizes and times of change."""
        return sidecar.fingerprint(self.paths)

    def _read_at(self, file: int, offset: int, size: int) -> bytes:
        # pread has no shared position, so threads need no lock. Two threads that open the same
        # file at once would lose one descriptor; setdefault tells which, and it is closed.
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            opened = os.open(self.paths[file], os.O_RDONLY)
            descriptor = self._descriptors.setdefault(file, opened)
            if descriptor != opened:
                os.close(opened)
        content = os.pread(descriptor, size, offset)
        if len(content) != size:
            raise records.BadRecordError(
                f"{self.paths[file]}: {len(content)} of {size} bytes at {offset}; "
                "the file was cut off or changed while in use"
            )
        return content


class JsonLines(_Files):
    """One JSON object a line. The index of byte offsets is made once per content of the file.

    Lines that are not a JSON object are left out and listed in `skipped`; empty lines are ignored.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str]):
        super().__init__(path)
        tables = []
        for number, file in enumerate(self.paths):
            index = sidecar.load("jsonl", sidecar.fingerprint([file]), lambda f=file: _scan(f))
            tables.append(np.insert(index["lines"], 0, number, axis=1))
            for line, cause in zip(index["bad_lines"], index["bad_causes"]):
                self.skipped.append((f"{file}:{line}", str(cause)))
        # [records, (file, line number from 1, offset, size)]
        self._table = np.concatenate(tables)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> records.Record:
        file, _, offset, size = map(int, self._table[index])
        try:
            return json.loads(self._read_at(file, offset, size))
        except records.BadRecordError:
            raise
        except ValueError as error:
            raise records.BadRecordError(f"{error}; the file changed while in use") from error

    def record_id(self, index: int) -> str:
        """File and line, from 1."""
        file, line = map(int, self._table[index, :2])
        return f"{self.paths[file]}:{line}"


def _scan(path: pathlib.Path) -> dict[str, np.ndarray]:
    lines, bad_lines, bad_causes, offset = [], [], [], 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                if line.strip():
                    if not isinstance(json.loads(line), dict):
                        raise ValueError("not a JSON object")
                    lines.append((number, offset, len(line)))
            except (ValueError, RecursionError) as error:
                bad_lines.append(number)
                bad_causes.append(f"{type(error).__name__}: {error}"[:200])
            offset += len(line)
    return {
        "lines": np.array(lines, np.int64).reshape(-1, 3),
        "bad_lines": np.array(bad_lines, np.int64),
        "bad_causes": np.array(bad_causes, np.str_),
    }


class TarShards(_Files):
    """Tar files whose members are grouped by name up to the first dot, as WebDataset writes them.

    Members are read in place and never extracted; anything but regular files (links, devices) is
    left out and listed in `skipped`.

    Args:
      path: see the module.
      members: extensions that are read; () is all. The others are not touched.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str], members: Sequence[str] = ()):
        super().__init__(path)
        self._wanted = frozenset(members)
        self._extensions: list[str] = []
        # Flat arrays: a third of the memory of dicts, and there are sets of 70 million records.
        tables = [self._table(number, file) for number, file in enumerate(self.paths)]
        self._files, self._num_members, self._key_sizes, self._members = (
            np.concatenate(column) for column in list(zip(*tables))[:4]
        )
        self._keys = b"".join(table[4] for table in tables)
        self._first = np.cumsum(self._num_members) - self._num_members
        self._key_ends = np.cumsum(self._key_sizes)

    def _table(self, number: int, file: pathlib.Path) -> tuple[Any, ...]:
        """Of one shard: per record (file, members, bytes of the key); members; keys."""
        index = sidecar.load("tar", sidecar.fingerprint([file]), lambda: _scan_tar(file))
        self.skipped += [(f"{file}:{name}", "not a regular file") for name in index["links"]]
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        for name, (offset, size) in zip(index["names"], index["places"].tolist()):
            key, extension = _split_name(str(name))
            groups.setdefault(key, {})[extension] = (offset, size)
        keys = [key.encode(errors="surrogateescape") for key in groups]
        members = [
            (self._code(extension), *place)
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

    def _code(self, extension: str) -> int:
        if extension not in self._extensions:
            self._extensions.append(extension)
        return self._extensions.index(extension)

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


_TAR_VALUES = {"json": json.loads, "txt": lambda content: content.decode(), "cls": int}


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _scan_tar(path: pathlib.Path) -> dict[str, np.ndarray]:
    names, places, links = [], [], []
    size = path.stat().st_size
    try:
        # "r:" reads uncompressed archives only: inside a compressed one nothing can be sought.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg():
                    if member.offset_data + member.size > size:
                        raise tarfile.TarError(f"member {member.name!r} is cut off")
                    names.append(member.name)
                    places.append((member.offset_data, member.size))
                elif not member.isdir():
                    links.append(member.name)
    except tarfile.TarError as error:
        raise records.DataError(
            f"{path}: {error}; shards must be complete and uncompressed (gunzip them first)"
        ) from error
    return {
        "names": np.array(names, np.str_),
        "places": np.array(places, np.int64).reshape(-1, 2),
        "links": np.array(links, np.str_),
    }


class ArrayRecord:
    """ArrayRecord files, one msgpack dict a record (or raw bytes)."""

    skipped: Sequence[tuple[str, str]] = ()

    def __init__(self, path: str | os.PathLike | Sequence[str], decode: str = "msgpack"):
        if decode not in ("msgpack", "raw"):
            raise records.DataError(f"decode={decode!r} is not 'msgpack' or 'raw'")
        module = records.require("array_record.python.array_record_data_source")
        self.paths, self._decode = find_files(path), decode
        try:
            self._reader = module.ArrayRecordDataSource([str(path) for path in self.paths])
            length = len(self._reader)
        except (RuntimeError, ValueError, IndexError) as error:
            raise records.DataError(
                f"{', '.join(map(str, self.paths))}: not ArrayRecord: {error}"
            ) from error
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> records.Record:
        try:
            content = self._reader[int(index)]
        except Exception as error:  # the reader raises bare RuntimeErrors and IndexErrors
            raise records.BadRecordError(f"{self.record_id(index)}: {error}") from error
        return {"bytes": content} if self._decode == "raw" else records.unpack(content)

    def record_id(self, index: int) -> str:
        """File (of one) or first file (of several), and the number over all files."""
        more = f"+{len(self.paths) - 1}" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}:{index}"

    def fingerprint(self) -> Any:
        """Paths, sizes and times of change."""
        return sidecar.fingerprint(self.paths)


class Tfds:
    """A prepared TensorFlow Datasets data set in ArrayRecord format, read without TensorFlow."""

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
        except Exception as error:
            raise records.DataError(
                f"TFDS {name!r}, split {split!r}, data_dir={data_dir!r}: {error}\n"
                "Remedy: prepare it once in ArrayRecord format (file_format='array_record')."
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> records.Record:
        return self._source[int(index)]

    def record_id(self, index: int) -> str:
        """Name, split and number."""
        return f"{self._name}/{self._split}:{index}"

    def fingerprint(self) -> Any:
        """Name, split and length."""
        return [self._name, self._split, len(self)]


TYPES = {
    "array_record": ArrayRecord,
    "jsonl": JsonLines,
    "tar": TarShards,
    "tfds": Tfds,
    "memory": Memory,
}
