"""Writes the sentences of a plan as shards: once each, resumable, the same from any process.

A folder of shards:

    NAME-00003-of-00010.array_record    complete, or not there
    shards/00003.json                   written after it: counts and failures; without it a shard
                                        is made again, to the same bytes
    manifest.json                       what the shards are made of; other arguments are refused
    failures.txt                        sentence and cause, of all shards once all are there
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import pictures, records
from vlm_jax.datasets import visual_sentences
from vlm_jax.encoders import image_tokenizer
from vlm_jax.systems.lvm import sentences, token_files

SUFFIXES = {"array_record": ".array_record", "jsonl": ".jsonl"}
IMAGES_PER_SHARD = 16_384  # where --shards does not say: a few seconds to minutes of one device
_REMEMBERED = 65_536  # images whose ids are kept in case they return
_COUNTS = ("sentences", "images", "files", "bad_files")  # of a note
_FEW = 100  # files before a share of bad ones means something


@dataclasses.dataclass(frozen=True)
class Job:
    """What to write.

    Attributes:
      plan, reader, tokenizer: sentences, pictures, ids.
      folder: of the shards; name: of their files; format: of SUFFIXES.
      shards: into how many the sentences are cut.
      threads: that read images.
      max_bad_fraction: of the files; above it the run stops.
    """

    plan: sentences.Sentences
    reader: pictures.Reader
    tokenizer: image_tokenizer.ImageTokenizer
    folder: pathlib.Path
    name: str
    format: str
    shards: int
    threads: int = 8
    max_bad_fraction: float = 0.01

    def path(self, shard: int) -> pathlib.Path:
        """Of the token file."""
        end = SUFFIXES[self.format]
        return self.folder / f"{self.name}-{shard:05d}-of-{self.shards:05d}{end}"

    def note(self, shard: int) -> pathlib.Path:
        """Of what is known about a complete shard."""
        return self.folder / "shards" / f"{shard:05d}.json"

    def numbers(self, shard: int) -> range:
        """Its sentences."""
        count = self.plan.count
        return range(count * shard // self.shards, count * (shard + 1) // self.shards)

    def known(self, shard: int) -> dict[str, Any] | None:
        """What `note` says of a complete shard; None when it must be made (again)."""
        note = _read_json(self.note(shard))
        whole = (
            isinstance(note, dict)
            and all(isinstance(note.get(key), int) for key in _COUNTS)
            and isinstance(note.get("failures"), list)
        )
        return note if whole and self.path(shard).is_file() else None


def check_manifest(folder: pathlib.Path, made_of: Mapping[str, Any]) -> None:
    """Writes manifest.json, or compares with the one that is there.

    Raises:
      DataError: the folder holds shards made of something else.
    """
    made_of = json.loads(json.dumps(made_of))
    path = folder / token_files.MANIFEST
    if not path.exists():
        _write_json(path, {"made_of": made_of})
    before = (_read_json(path) or {}).get("made_of")
    if not isinstance(before, dict):
        raise records.DataError(
            f"{path}: is not a manifest of token shards; give another --out, or delete it when "
            "nothing else is there"
        )
    differ = [key for key in sorted({*before, *made_of}) if before.get(key) != made_of.get(key)]
    if differ:
        lines = [f"  {key}: {before.get(key)!r} there, {made_of.get(key)!r} now" for key in differ]
        raise records.DataError(
            f"{path}: the shards there are made of something else; continue with the same "
            "arguments, or give another --out\n" + "\n".join(lines)
        )


def write(job: Job, shards: Sequence[int], stream=None) -> dict[str, int]:
    """Writes those of the shards that are not complete.

    Returns:
      Counts of this call: sentences, images (encoded), failures (sentences left out), kept (shards
      that were there).

    Raises:
      DataError: too many files cannot be read.
    """
    (job.folder / "shards").mkdir(parents=True, exist_ok=True)
    notes = {shard: job.known(shard) for shard in shards}
    todo = [shard for shard, note in notes.items() if note is None]
    kept = [note for note in notes.values() if note is not None]
    report = _Report(job, todo, kept, stream or sys.stderr)
    with concurrent.futures.ThreadPoolExecutor(job.threads) as pool:
        try:
            for shard in todo:
                for left in job.folder.glob(f".{job.path(shard).name}.*"):
                    left.unlink(missing_ok=True)  # of a process that was killed
                report.begin()
                visual_sentences.write(job.path(shard), _sentences(job, shard, pool, report))
                _write_json(job.note(shard), report.shard)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            report.close()
    notes = [job.known(shard) for shard in range(job.shards)]
    if None not in notes:
        _summarize(job, notes)
    return {**report.total, "kept": len(kept)}


def _summarize(job: Job, notes: Sequence[Mapping[str, Any]]) -> None:
    """Totals into the manifest, failures into one file; equal whoever comes last."""
    lines = [f"{name}\t{cause}\n" for note in notes for name, cause in note["failures"]]
    _write_text(job.folder / "failures.txt", "".join(lines))
    manifest = _read_json(job.folder / token_files.MANIFEST) or {}
    totals = {key: sum(note[key] for note in notes) for key in _COUNTS}
    manifest["counts"] = {"shards": job.shards, **totals, "failures": len(lines)}
    _write_json(job.folder / token_files.MANIFEST, manifest)


def _read_json(path: pathlib.Path) -> Any:
    """None when there is no such file, or no JSON in it."""
    try:
        return records.parse_json(path.read_bytes())
    except (OSError, records.BadRecordError):
        return None


def _write_json(path: pathlib.Path, content: Any) -> None:
    _write_text(path, json.dumps(content, indent=1) + "\n")


def _write_text(path: pathlib.Path, text: str) -> None:
    # Machines that share the folder may have equal process ids.
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    partial.write_text(text, **records.TEXT)
    os.replace(partial, path)


@dataclasses.dataclass(eq=False)
class _Cell:
    """Ids of one picture, once they are known, or why there are none."""

    ids: np.ndarray | None = None
    cause: str = ""

    @property
    def done(self) -> bool:
        return self.ids is not None or bool(self.cause)


def _sentences(
    job: Job, shard: int, pool: concurrent.futures.Executor, report: _Report
) -> Iterator[visual_sentences.Sentence]:
    """The sentences of one shard; one with an image that cannot be read is left out."""
    work = _Shard(job, pool, report)
    draw = _or_error(job.plan.draw)
    for number, drawn in _ahead(pool, draw, job.numbers(shard), 2 * job.threads):
        work.add(number, drawn)
        work.settle(2 * job.tokenizer.max_batch)
        yield from work.finished()
    work.settle(0)
    yield from work.finished()
    report.check()


class _Shard:
    """Sentences on their way: drawn, waiting for files, waiting for the device.

    Batches begin anew with every shard and are filled in the order of the sentences, so that the
    bytes depend neither on what was done before nor on the speed of the threads.
    """

    def __init__(self, job: Job, pool: concurrent.futures.Executor, report: _Report):
        self._job, self._pool, self._report = job, pool, report
        self._read = _or_error(job.reader.read)
        self._cells: dict[pictures.Picture, _Cell] = {}
        self._waiting: collections.deque[tuple[int, list[_Cell]]] = collections.deque()
        self._loading: collections.deque[tuple[list[_Cell], Any]] = collections.deque()
        self._ready: list[tuple[_Cell, np.ndarray]] = []

    def add(self, number: int, drawn: list[pictures.Picture] | Exception) -> None:
        """Starts to read what a sentence needs and is not known yet."""
        if isinstance(drawn, Exception):
            self._report.file(bad=True)
            self._waiting.append((number, [_Cell(cause=str(drawn))]))
            return
        new = list(dict.fromkeys(picture for picture in drawn if picture not in self._cells))
        self._cells.update((picture, _Cell()) for picture in new)
        self._waiting.append((number, [self._cells[picture] for picture in drawn]))
        for group in _by_file(new):
            future = self._pool.submit(self._read, group)
            self._loading.append(([self._cells[picture] for picture in group], future))
        while len(self._cells) > _REMEMBERED:
            del self._cells[next(iter(self._cells))]

    def settle(self, most: int) -> None:
        """Encodes until at most so many images are being read; with 0, all."""
        batch = self._job.tokenizer.max_batch
        while sum(len(cells) for cells, _ in self._loading) > most:
            cells, future = self._loading.popleft()
            images01 = future.result()
            bad = isinstance(images01, Exception)
            if bad:
                for cell in cells:
                    cell.cause = str(images01)
            else:
                self._ready.extend(zip(cells, images01))
            self._report.file(bad)
            while len(self._ready) >= batch:
                self._encode(batch)
        while self._ready and not most:
            self._encode(batch)

    def finished(self) -> Iterator[visual_sentences.Sentence]:
        """The next sentences whose images are all known."""
        while self._waiting and all(cell.done for cell in self._waiting[0][1]):
            number, row = self._waiting.popleft()
            name = self._job.name
            cause = next((cell.cause for cell in row if cell.cause), "")
            self._report.sentence(f"{name}:{number}", cause)
            if not cause:
                tokens = np.concatenate([cell.ids for cell in row])
                yield visual_sentences.Sentence(tokens, len(row), f"{name}:{number}", name)

    def _encode(self, batch: int) -> None:
        chosen, self._ready = self._ready[:batch], self._ready[batch:]
        images01 = np.stack([image01 for _, image01 in chosen])
        # The last batch of a shard is filled up: one program is compiled, not one for every size.
        images01 = np.pad(images01, [(0, batch - len(chosen))] + [(0, 0)] * 3)
        for (cell, _), ids in zip(chosen, self._job.tokenizer.encode(images01)):
            cell.ids = ids
        self._report.encoded(len(chosen))


def _by_file(chosen: Sequence[pictures.Picture]) -> list[list[pictures.Picture]]:
    groups: dict[str, list[pictures.Picture]] = {}
    for picture in chosen:
        groups.setdefault(picture.path, []).append(picture)
    return list(groups.values())


def _or_error(function: Callable) -> Callable:
    """The function, returning instead of raising what is wrong with one record."""

    def call(argument):
        try:
            return function(argument)
        except records.BadRecordError as error:
            return error

    return call


def _ahead(
    pool: concurrent.futures.Executor, function: Callable, arguments: Iterable, window: int
) -> Iterator[tuple[Any, Any]]:
    """(argument, result) in order, computed some way ahead."""
    pending: collections.deque[tuple[Any, concurrent.futures.Future]] = collections.deque()
    for argument in arguments:
        pending.append((argument, pool.submit(function, argument)))
        if len(pending) > window:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


class _Report:
    """Counts, names failures, stops at too many of them, and shows progress.

    Attributes:
      total: of this call, see `write`.
      shard: counts and failures of the shard in work.
    """

    def __init__(self, job: Job, todo: Sequence[int], kept: Sequence[Mapping[str, Any]], stream):
        self.total = {"sentences": 0, "images": 0, "failures": 0}
        self.shard: dict[str, Any] = {}
        self._limit, self._stream = job.max_bad_fraction, stream
        # Shards made earlier count too, so that a stopped run is not let through when resumed.
        self._files = sum(note["files"] for note in kept)
        self._bad_files = sum(note["bad_files"] for note in kept)
        self._seen, self._of = 0, sum(len(job.numbers(shard)) for shard in todo)
        self._named: dict[str, None] = {}
        self._start_s = self._shown_s = time.monotonic()

    def begin(self) -> None:
        self.shard = {**dict.fromkeys(_COUNTS, 0), "failures": []}

    def encoded(self, count: int) -> None:
        self.total["images"] += count
        self.shard["images"] += count
        self._show()

    def file(self, bad: bool) -> None:
        self._files += 1
        self._bad_files += bad
        self.shard["files"] += 1
        self.shard["bad_files"] += bad

    def sentence(self, name: str, cause: str) -> None:
        self._seen += 1
        if not cause:
            self.total["sentences"] += 1
            self.shard["sentences"] += 1
            return
        self.total["failures"] += 1
        self.shard["failures"].append((name, cause))
        if cause not in self._named:
            self._named[cause] = None
            self._clear()
            print(f"[tokenize] left out {name}: {cause}", file=self._stream, flush=True)
        self.check()

    def check(self) -> None:
        """Stops when more of the files are bad than is allowed."""
        enough = self._files >= _FEW or self._seen == self._of
        if enough and self._bad_files > self._limit * self._files:
            causes = [f"  {cause}" for cause in list(self._named)[:5]]
            raise records.DataError(
                f"{self._bad_files} of {self._files} files cannot be used, more than "
                f"--max_bad_fraction={self._limit}:\n" + "\n".join(causes)
            )

    def close(self) -> None:
        self._clear()

    def _show(self) -> None:
        now, terminal = time.monotonic(), self._stream.isatty()
        if now - self._shown_s < (0.2 if terminal else 10.0):
            return
        self._shown_s = now
        rate = self.total["images"] / (now - self._start_s)
        rest_s = (now - self._start_s) * (self._of - self._seen) / max(1, self._seen)
        share = self._seen / max(1, self._of)
        line = (
            f"{self._seen}/{self._of} sentences  {rate:.4g} images/s  {self.total['failures']} "
            f"left out  ETA {int(rest_s) // 60}:{int(rest_s) % 60:02d}"
        )
        if terminal:
            bar = f"[{'#' * int(20 * share):.<20}] {line}"
            self._stream.write("\r\x1b[K" + bar[: shutil.get_terminal_size().columns - 1])
            self._stream.flush()
        else:
            print(f"[tokenize] {line}", file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")
