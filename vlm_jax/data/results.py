"""Results of many inputs in a file, written batch by batch; the same command goes on in it.

OUT.jsonl            {"id": ..., ...} per input
OUT.csv              rows of an input, its id in the first column
OUT.jsonl.state      what made them, and how many bytes of OUT.jsonl are complete
OUT.jsonl.failed     inputs that could not be read, with the cause; tried again next time
"""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlm_jax.data import records, streaming

_EVERY_S = 5.0
_CSV: dict[str, Any] = {
    "encoding": "utf-8",
    "errors": "surrogateescape",
}  # CSV has no escapes for odd names


class Results:
    """The file of one process.

    Args:
      path: ends with .jsonl, or .csv where `columns` are given.
      settings: JSON-like; everything that the results depend on besides the inputs.
      columns: of a .csv, "id" first; () when the results are not flat.
      start_anew: a file that other settings made is emptied, and is no error.

    Raises:
      DataError: another suffix; a file that other settings, or something else, made.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: Mapping[str, Any],
        columns: Sequence[str] = (),
        *,
        start_anew: bool = False,
    ):
        self.path = pathlib.Path(path)
        self._columns = tuple(columns)
        kinds = (".jsonl", ".csv") if columns else (".jsonl",)
        if self.path.suffix.lower() not in kinds:
            raise records.DataError(f"{path}: --out ends with {' or '.join(kinds)}, or is a folder")
        self._state = self.path.with_name(self.path.name + ".state")
        self._start_anew = start_anew
        self._settings = json.loads(json.dumps(settings))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut(self._complete())
        self.done = {row["id"] for row in self.rows()}

    def __len__(self) -> int:
        return len(self.done)

    @property
    def is_csv(self) -> bool:
        """Whether rows are flat."""
        return self.path.suffix.lower() == ".csv"

    def _complete(self) -> int:
        """Bytes that are known to be whole."""
        if not self.path.exists():
            return 0
        try:
            state = records.parse_json(self._state.read_bytes())
            before, size = state["settings"], int(state["bytes"])
        except (OSError, records.BadRecordError, LookupError, TypeError, ValueError) as error:
            raise records.DataError(
                f"{self.path} is there, and no {self._state.name} says what made it; give another "
                f"--out"
            ) from error
        changed = [
            f"{key}={before.get(key)!r} there, {self._settings.get(key)!r} now"
            for key in sorted({*before, *self._settings})
            if before.get(key) != self._settings.get(key)
        ]
        if changed and self._start_anew:
            return 0
        if changed:
            raise records.DataError(
                f"{self.path} was made with other settings: {'; '.join(changed)}; give another "
                f"--out"
            )
        return size

    def _cut(self, size: int) -> None:
        self._stream = open(self.path, "ab")
        if self._stream.tell() < size:
            raise records.DataError(f"{self.path}: shorter than it was; give another --out")
        self._stream.truncate(size)
        if not size and self.is_csv:
            self._stream.write(self._csv([dict(zip(self._columns, self._columns))]))
        self._note()

    def rows(self) -> Iterator[dict[str, Any]]:
        """What the file holds."""
        if self.is_csv:
            with open(self.path, newline="", **_CSV) as stream:
                yield from csv.DictReader(stream)
        else:
            with open(self.path, **records.TEXT) as stream:
                yield from map(json.loads, stream)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows of whole inputs; they are on disk afterwards."""
        if self.is_csv:
            content = self._csv(rows)
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            content = "".join(lines).encode(**records.TEXT)
        self._stream.write(content)
        self._note()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def discard(self) -> None:
        """Removes the file, when all of it stands elsewhere."""
        self.path.unlink()
        self._state.unlink()

    def _csv(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerows(rows)
        return text.getvalue().encode(**_CSV)

    def _note(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        partial = self._state.with_name(self._state.name + ".part")
        state = {"settings": self._settings, "bytes": self._stream.tell()}
        partial.write_text(json.dumps(state) + "\n", **records.TEXT)
        os.replace(partial, self._state)


def run(
    names: Sequence[str],
    results: Results,
    made: Callable[[Sequence[str]], Iterator[Any]],
    rows: Callable[[str, Any], Sequence[Mapping[str, Any]]],
    *,
    batch_size: int,
) -> int:
    """Works through the inputs that have no result yet; says how it goes on stderr.

    Args:
      names: of the inputs.
      results: where they go.
      made: names -> for each what was made of it, or the error why nothing was.
      rows: a name and what was made of it -> rows of the file.
      batch_size: inputs whose results are written together.

    Returns:
      The exit status: 0, or 1 when no input at all could be used.
    """
    todo = [name for name in names if name not in results.done]
    kept, failed = len(names) - len(todo), []
    progress = _Progress(len(todo), kept)
    for batch in streaming.batches(zip(todo, made(todo)), batch_size):
        good = [pair for pair in batch if not isinstance(pair[1], records.BadRecordError)]
        failed += [(name, str(x)) for name, x in batch if isinstance(x, records.BadRecordError)]
        results.write([row for pair in good for row in rows(*pair)])
        results.done.update(name for name, _ in good)
        progress.add(len(batch), len(failed))
    results.close()
    file = results.path.with_name(results.path.name + ".failed")
    file.write_text("".join(f"{name}\t{cause}\n" for name, cause in failed), **records.TEXT)
    if not failed:
        file.unlink()
    for _, cause in failed[:8]:
        print(f"vlm_jax: {cause}", file=sys.stderr)
    worked = len(todo) - len(failed)
    print(
        f"vlm_jax: {worked} inputs done, {kept} were there, {len(failed)} unreadable"
        f"{f' (see {file})' if failed else ''}: {results.path}",
        file=sys.stderr,
    )
    return 0 if worked or kept or not names else 1


def of_process(path: str | os.PathLike, count: int, rank: int) -> pathlib.Path:
    """The file of one of several processes; of one alone the path itself."""
    path = pathlib.Path(path)
    return path if count == 1 else path.with_stem(f"{path.stem}-{rank:05d}-of-{count:05d}")


class _Progress:
    """A line on stderr now and then: how many, how fast, how long still."""

    def __init__(self, total: int, kept: int):
        self._total, self._done = total, 0
        self._start = self._shown = time.monotonic()
        if kept:
            print(f"vlm_jax: {kept} inputs have results, {total} are left", file=sys.stderr)

    def add(self, count: int, failed: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown < _EVERY_S or self._done == self._total:
            return
        self._shown = now
        rate = self._done / (now - self._start)
        left = int((self._total - self._done) / rate)
        print(
            f"vlm_jax: {self._done} of {self._total} inputs, {rate:.1f}/s, {failed} unreadable, "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
            file=sys.stderr,
        )
