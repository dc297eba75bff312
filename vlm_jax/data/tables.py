"""Tables that say what is on pictures: CSV, TSV or JSONL, a line per picture and text.

    file,caption                                    {"image": "a.jpg", "labels": ["cat", "sofa"]}
    a.jpg,a cat on a sofa                           {"image": "b.jpg", "caption": "a dog"}

Columns are found by their usual names (`FILES`, `LABELS`, `CAPTIONS`), or named. Labels are a list,
or text cut at commas, semicolons and bars. Several lines of one picture are put together.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import pathlib
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_jax.data import file_kind, records, shard_files

SUFFIXES = (".csv", ".tsv", ".jsonl")
FILES = ("file_name", "filename", "file", "image", "image_path", "path", "filepath", "photo")
LABELS = ("labels", "label", "classes", "class", "class_name", "category", "categories", "tags")
CAPTIONS = ("caption", "captions", "text", "txt", "sentence", "description")
_SEPARATORS = ",;\t"
_BETWEEN_LABELS = re.compile(r"[,;|]")
MAX_BYTES = 2**30


@dataclasses.dataclass
class Entry:
    """What a table says about one picture.

    Attributes:
      file: as it is written there.
      line: where it is said first, from 1.
      labels, captions: without repetitions, in order.
    """

    file: str
    line: int
    labels: list[str] = dataclasses.field(default_factory=list)
    captions: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Table:
    """The content of a file.

    Attributes:
      path: of the file.
      entries: one per picture, in order of first mention.
      bad: (place, cause) of lines that cannot be used.
      duplicates: (place, file) of lines that say again what an earlier one said.
    """

    path: pathlib.Path
    entries: list[Entry]
    bad: list[tuple[str, str]]
    duplicates: list[tuple[str, str]]


def read(path: str | os.PathLike, file_column: str = "", text_column: str = "") -> Table:
    """Reads a table.

    Args:
      path: ends in one of `SUFFIXES`.
      file_column, text_column: names of columns where they are not the usual ones. A text column
        holds captions, unless it has a name of `LABELS`.

    Raises:
      DataError: no such file, no header, no column of pictures or texts, not UTF-8.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise records.DataError(f"{path}: not a table; it must end in {', '.join(SUFFIXES)}")
    try:
        content = shard_files.read_bytes(path, MAX_BYTES)
        if content and (reason := file_kind.not_data(path)):
            raise records.DataError(f"{path} {reason}")
        text = content.decode("utf-8-sig")
    except records.BadRecordError as error:
        raise records.DataError(str(error)) from error
    except UnicodeDecodeError as error:
        raise records.DataError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    lines = _json_lines(text) if path.suffix.lower() == ".jsonl" else _cells(path, text)
    return _gather(path, lines, file_column, text_column)


def find(folder: pathlib.Path) -> pathlib.Path | None:
    """The table of a folder, if there is one.

    Raises:
      DataError: several.
    """
    found = sorted(
        x for x in folder.iterdir() if x.suffix.lower() in SUFFIXES and not x.name.startswith(".")
    )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise records.DataError(f"{folder} holds {names}; name the one that is meant as path")
    return found[0] if found else None


def split_labels(text: str) -> list[str]:
    """'cat, sofa' -> ['cat', 'sofa']; underscores are spaces."""
    parts = (part.replace("_", " ").strip() for part in _BETWEEN_LABELS.split(text))
    return [part for part in parts if part]


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(io.StringIO(text), 1):
        if line.strip():
            try:
                row = records.parse_json(line)
            except ValueError as error:
                row = f"not JSON: {error}"
            yield number, row if isinstance(row, dict | str) else "not a JSON object"


def _cells(path: pathlib.Path, text: str) -> Iterator[tuple[int, Any]]:
    header = text.partition("\n")[0]
    separator = max(_SEPARATORS, key=header.count)
    # Strict: else a quote that nobody closes takes all lines behind it into one text.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, f"lines {first} to {reader.line_num}: {error}"
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = [name.strip() for name in cells]
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise records.DataError(f"{path}: the column {twice[0]!r} comes twice")
        elif len(cells) > len(names):
            cause = f"{len(cells)} cells under {len(names)} columns; quote a text with commas"
            yield reader.line_num, cause
        else:
            yield reader.line_num, dict(zip(names, cells))


def _gather(path, lines, file_column: str, text_column: str) -> Table:
    entries: dict[str, Entry] = {}
    bad: list[tuple[str, str]] = []
    duplicates: list[tuple[str, str]] = []
    names: set[str] = set()
    for number, row in lines:
        place = f"{path}:{number}"
        if isinstance(row, str):
            bad.append((place, row))
            continue
        names.update(row)
        try:
            file = _file(row, file_column)
            labels, captions = _texts(row, text_column)
        except ValueError as error:
            bad.append((place, str(error)))
            continue
        entry = entries.setdefault(file, Entry(file, number))
        new = _add(entry.labels, labels) + _add(entry.captions, captions)
        if not new:
            duplicates.append((place, file))
    if not entries:
        first = f"; the first: {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise records.DataError(
            f"{path}: no line that names a picture (column {' or '.join(FILES[:4])}) and its text "
            f"(labels or caption); columns there: {', '.join(map(str, sorted(names))) or 'none'}"
            f"{first}"
        )
    return Table(path, list(entries.values()), bad, duplicates)


def _add(known: list[str], more: list[str]) -> int:
    new = [text for text in dict.fromkeys(more) if text not in known]
    known += new
    return len(new)


def _file(row: Mapping[str, Any], column: str) -> str:
    name = _column(row, (column,) if column else FILES)
    if name is None:
        raise ValueError(f"no column {column or ' or '.join(FILES[:4])} that names a picture")
    file = row[name]
    if not isinstance(file, str) or not file.strip():
        raise ValueError(f"{name} is {file!r:.60}, not the name of a file")
    return posixpath.normpath(file.strip())


def _texts(row: Mapping[str, Any], column: str) -> tuple[list[str], list[str]]:
    names = [column] if column else [*LABELS, *CAPTIONS]
    found = [name for name in row if name in names or name.lower() in names]
    labels: list[str] = []
    captions: list[str] = []
    for name in found:
        texts = _strings(row[name], name)
        if name.lower() in LABELS:
            labels += [label for text in texts for label in split_labels(text)]
        else:
            captions += [text.strip() for text in texts if text.strip()]
    if not found:
        raise ValueError(f"no column {column or 'with labels or a caption'}")
    if not labels and not captions:
        raise ValueError(f"no text in {', '.join(found)}")
    return labels, captions


def _strings(value: Any, name: str) -> list[str]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(x, str) for x in values):
        raise ValueError(f"{name} is {value!r:.60}, not text or a list of texts")
    return values


def _column(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    lower = {str(name).lower(): name for name in reversed(list(row))}
    return next((lower[name.lower()] for name in names if name.lower() in lower), None)
