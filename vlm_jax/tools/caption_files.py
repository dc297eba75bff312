"""Files of captions, row by row: what `extract_labels` reads.

    .tar          the STEM.txt of a shard, one sample a row
    .txt          a caption a line
    .tsv          CAPTION, a tab, anything (CC3M); with the name of a column, a table with a header
    .csv          a table with a header and the name of a column
    .jsonl        objects with "caption", "captions" or "txt", or with the column
    X.gz          any of these, compressed

Files are not trusted: lines, names and what a compressed file unpacks to have bounds.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vlm_jax.data import file_kind, records, sources, tar_index

FORMS = (".tar", ".txt", ".tsv", ".csv", ".jsonl")
MAX_LINE = 2**20  # bytes
_MAX_RATIO = 200  # of a compressed file to its content; captions are smaller by 3 to 10
_FREE_BYTES = 2**26  # unpacked before the ratio counts
_KEYS = ("caption", "captions", "txt")

Read = Callable[[], dict[str, Any]]


class Row(NamedTuple):
    """One row.

    Attributes:
      key: of a sample, or the number of the line, from 1.
      read: gives {"caption" or "captions" or "txt": ...}; raises BadRecordError.
    """

    key: str
    read: Read


def form_of(file: pathlib.Path) -> str:
    """One of `FORMS`, by the name.

    Raises:
      DataError: another suffix.
    """
    name = file.name.lower().removesuffix(".gz")
    for form in FORMS:
        if name.endswith(form):
            return form
    raise records.DataError(
        f"{file}: ends in none of {', '.join(FORMS)}, each also with .gz; captions in other files "
        "must be brought into one of these forms"
    )


def check_column(file: pathlib.Path, column: str) -> None:
    """Raises DataError when the file is a table and has no such column."""
    form = form_of(file)
    if form == ".csv" and not column:
        raise records.DataError(f"{file}: name its column of captions with --column")
    if column and form in (".csv", ".tsv"):
        with _lines(file) as lines:
            _header(file, _cells(form, lines), column)


def count(file: pathlib.Path, column: str = "") -> int:
    """Rows of a file of lines; empty lines of .jsonl and tables are none.

    Raises:
      DataError: the file is damaged, or unpacks to more than can be.
    """
    return sum(1 for _ in rows(file, column))


def rows(
    file: pathlib.Path, column: str = "", start: int = 0, stop: int | None = None
) -> Iterator[Row]:
    """Rows [start, stop) in order, or all.

    Raises:
      DataError: as `count`.
    """
    return itertools.islice(_rows(file, column), start, stop)


def notes(file: pathlib.Path) -> list[str]:
    """What was left out of a shard before its samples were made, for people."""
    if form_of(file) != ".tar":
        return []
    with _plain(file) as path:
        index = tar_index.scan(path)
    return [f"{name}: {cause}" for name, cause in zip(index["bad_names"], index["bad_causes"])]


def _rows(file: pathlib.Path, column: str) -> Iterator[Row]:
    form = form_of(file)
    if form == ".tar":
        yield from _samples(file)
        return
    with _lines(file) as lines:
        if form == ".jsonl":
            yield from _objects(lines, column)
        elif form == ".csv" or column:
            yield from _table(file, _cells(form, lines), column)
        else:
            cut = form == ".tsv"
            for number, line in enumerate(lines, 1):
                yield Row(str(number), lambda line=line: _text(line, cut))


def _samples(file: pathlib.Path) -> Iterator[Row]:
    with _plain(file) as path, open(path, "rb") as stream:
        for key, members in tar_index.samples(tar_index.scan(path)).items():
            yield Row(key, lambda members=members: _sample(stream.fileno(), members))


def _sample(descriptor: int, members: dict[str, tuple[int, int]]) -> dict[str, Any]:
    if "txt" not in members:
        raise records.BadRecordError(f"no txt among {records.keys_of(members)}")
    offset, size = members["txt"]
    if size > MAX_LINE:
        raise records.BadRecordError(f"a text of {size} bytes; at most {MAX_LINE} are read")
    content = os.pread(descriptor, size, offset)
    if len(content) != size:
        raise records.BadRecordError("the file was cut off or changed while in use")
    return {"txt": _decode(content)}


def _objects(lines: Iterator[bytes | None], column: str) -> Iterator[Row]:
    def read(line: bytes | None) -> dict[str, Any]:
        record = records.parse_json(_whole(line))
        if not isinstance(record, dict):
            raise records.BadRecordError("not a JSON object")
        if not column:
            return {key: record[key] for key in _KEYS if key in record}
        if column not in record:
            raise records.BadRecordError(f"no {column!r} among {records.keys_of(record)}")
        return {"captions" if isinstance(record[column], list) else "caption": record[column]}

    for number, line in enumerate(lines, 1):
        if line is None or line.strip():
            yield Row(str(number), lambda line=line: read(line))


def _table(
    file: pathlib.Path, cells: Iterator[tuple[int, list[str] | str]], column: str
) -> Iterator[Row]:
    names, place = _header(file, cells, column)

    def read(found: list[str] | str) -> dict[str, Any]:
        if isinstance(found, str):
            raise records.BadRecordError(found)
        if len(found) != len(names):
            raise records.BadRecordError(f"{len(found)} fields under {len(names)} names")
        try:
            found[place].encode()
        except UnicodeEncodeError as error:
            raise records.BadRecordError("not UTF-8") from error
        return {"caption": found[place]}

    for number, found in cells:
        yield Row(str(number), lambda found=found: read(found))


def _header(
    file: pathlib.Path, cells: Iterator[tuple[int, list[str] | str]], column: str
) -> tuple[list[str], int]:
    _, names = next(cells, (0, []))
    names = [names] if isinstance(names, str) else [name.strip() for name in names]
    if column not in names:
        shown = ", ".join(f"{name:.40}" for name in names[:12])
        raise records.DataError(f"{file}: no column {column!r} among its first line: {shown}")
    if names.count(column) > 1:
        raise records.DataError(f"{file}: the column {column!r} comes twice")
    return names, names.index(column)


def _cells(form: str, lines: Iterator[bytes | None]) -> Iterator[tuple[int, list[str] | str]]:
    """(number of the row's last line, its fields or why there are none); empty rows are left out.

    Quoted fields go over several lines in .csv; in .tsv quotes are letters, as CC3M has them.
    """
    # A line that is too long becomes a letter that is not UTF-8, and with it a bad row.
    text = ((line or b"\xff").decode("utf-8-sig", "surrogateescape") for line in lines)
    quoting = csv.QUOTE_NONE if form == ".tsv" else csv.QUOTE_MINIMAL
    separator = "\t" if form == ".tsv" else ","
    reader = csv.reader(text, delimiter=separator, quoting=quoting, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            found = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # these lines are lost, those behind them are not
            yield reader.line_num, f"lines {first} to {reader.line_num}: {error}"
            continue
        if found:
            yield reader.line_num, found


def _text(line: bytes | None, cut: bool) -> dict[str, Any]:
    text = _whole(line)
    if cut:
        text, tab, _ = text.partition(b"\t")
        if not tab:
            raise records.BadRecordError("no tab in the line: not CAPTION, tab, URL")
    return {"txt": _decode(text).strip()}


def _decode(content: bytes) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise records.BadRecordError(f"not UTF-8: {error}") from error
    if "\0" in text:
        raise records.BadRecordError("a zero byte in the text: UTF-16, or no text")
    return text


def _whole(line: bytes | None) -> bytes:
    if line is None:
        raise records.BadRecordError(f"a line of more than {MAX_LINE} bytes")
    return line


@contextlib.contextmanager
def _lines(file: pathlib.Path) -> Iterator[Iterator[bytes | None]]:
    with _opened(file) as stream:
        buffered = io.BufferedReader(stream)
        if buffered.peek(2)[:2] in records.UTF_16:
            raise records.DataError(f"{file}: is UTF-16, not UTF-8; save it as UTF-8")
        yield (line for line, _ in sources.lines(buffered, MAX_LINE))


@contextlib.contextmanager
def _plain(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """The file itself, or an unpacked copy: a shard is read here and there."""
    if not file.name.lower().endswith(".gz"):
        yield file
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as copy, _opened(file) as stream:
        shutil.copyfileobj(stream, copy, 2**20)
        copy.flush()
        yield pathlib.Path(copy.name)


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[io.RawIOBase]:
    try:
        # An empty file is one without captions.
        if file.stat().st_size and (reason := file_kind.not_data(file)):
            raise records.DataError(f"{file} {reason}")
        with file.open("rb", buffering=0) as raw:
            if not file.name.lower().endswith(".gz"):
                yield raw
                return
            size = os.fstat(raw.fileno()).st_size
            with gzip.open(raw) as unpacked:
                yield _Bounded(unpacked, max(_FREE_BYTES, _MAX_RATIO * size))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise records.DataError(f"{file}: damaged or cut off: {error}") from error
    except _TooMuch as error:
        raise records.DataError(f"{file}: {error}") from error


class _TooMuch(Exception):
    pass


class _Bounded(io.RawIOBase):
    """A stream that ends in an error after so many bytes."""

    def __init__(self, stream: io.BufferedIOBase, most: int):
        self._stream, self._left, self._most = stream, most, most

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer) -> int:
        """As `io.RawIOBase`."""
        size = self._stream.readinto(buffer)
        self._left -= size
        if self._left < 0:
            raise _TooMuch(
                f"unpacks to more than {self._most} bytes, {_MAX_RATIO} times its size: no captions"
            )
        return size
