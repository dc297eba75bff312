r"""Extracts the labels of captions once, ahead of training, for millions of captions.

    python -m vlm_jax.tools.extract_labels --path=data/cc3m/cc3m data/sbu/sbu --to=labels
    python -m vlm_jax.tools.extract_labels --path='captions/*.jsonl' --to=labels --tagger=textblob

Reads tar shards (STEM.txt), .jsonl ("caption", "captions" or "txt"), .tsv (the caption before the
first tab), .csv (--column) and .txt (a caption a line), each also with .gz; a folder is searched
for .tar. Writes one JSON Lines file per input file, which the data source "caption_shards" takes as
`labels=`. Every file appears complete or not at all: after a kill, start the same command again,
and what is done is left alone. A file of another size or time than then is done again. Several
machines share the work with --num_processes and --process_id.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vlm_jax.machines import console, disk
from vlm_jax.tools import caption_files

_SETTINGS = "extraction.json"
_VERSION = 1  # of the rules and of the files
_PLAIN_EVERY_S = 10.0
_MAX_PARTS = 64  # of a file; each part passes over the rows before its own
_SHOWN = 8  # bad captions that are said


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 when a file, or no caption, could be read."""
    console.tolerate_any_text()
    parser = argparse.ArgumentParser(
        prog="extract_labels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--path", nargs="+", action="extend", required=True, help="files, globs or folders"
    )
    parser.add_argument("--to", required=True, help="folder for the labels")
    parser.add_argument("--column", default="", help="of the captions in .csv, .tsv and .jsonl")
    parser.add_argument("--tagger", default="nltk", help="nltk (the reference's) or textblob")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="0: none apart")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--process_id", type=int, default=0)
    parser.add_argument(
        "--rows_per_part", type=int, default=50_000, help="of line files: parts done side by side"
    )
    args = parser.parse_args(argv)
    from vlm_jax.data import records

    try:
        totals = extract(
            args.path,
            args.to,
            column=args.column,
            tagger=args.tagger,
            workers=args.workers,
            num_processes=args.num_processes,
            process_id=args.process_id,
            rows_per_part=args.rows_per_part,
        )
    except (records.DataError, records.MissingExtraError, OSError) as error:
        print(f"extract_labels: {disk.explain(error, args.to)}", file=sys.stderr)
        return 1
    print(
        f"{totals.files} files done, {totals.left_alone} left alone, {totals.captions} captions, "
        f"{totals.labels} labels, {totals.without} captions without any, {totals.bad} unreadable"
    )
    return 1 if totals.failed else 0


class Totals(NamedTuple):
    """What a run did.

    Attributes:
      files, left_alone, failed: input files done, found done, and not readable.
      captions, labels, without, bad: captions read, their labels, captions without a noun, and
        captions that could not be read.
    """

    files: int = 0
    left_alone: int = 0
    failed: int = 0
    captions: int = 0
    labels: int = 0
    without: int = 0
    bad: int = 0

    def plus(self, **more: int) -> Totals:
        """The sum."""
        return self._replace(**{key: getattr(self, key) + x for key, x in more.items()})


def extract(
    path: str | Sequence[str],
    folder: str,
    *,
    column: str = "",
    tagger: str = "nltk",
    workers: int = 0,
    num_processes: int = 1,
    process_id: int = 0,
    rows_per_part: int = 50_000,
) -> Totals:
    """Writes the labels of all files of this process.

    Raises:
      DataError: no input, files of no known form, a folder that was written with other settings,
        two inputs of one name, the tagger's data are missing.
      MissingExtraError: the tagger is not installed.
    """
    from vlm_jax.data import records
    from vlm_jax.datasets import caption_shards
    from vlm_jax.systems.nxtp import labels

    if workers < 0 or rows_per_part < 1:
        raise records.DataError(f"workers={workers} or rows_per_part={rows_per_part} is too small")
    if not 0 <= process_id < num_processes:
        raise records.DataError(f"process_id {process_id} is not below {num_processes}")
    labels.make_tagger(tagger)  # says at once when something is missing
    files = caption_shards.find_shards(path)
    targets = [caption_shards.labels_file(folder, file) for file in files]
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        both = [str(file) for file, target in zip(files, targets) if target == twice]
        raise records.DataError(f"{', '.join(both)} would share {twice}; give them another --to")
    for file in files:
        caption_files.check_column(file, column)
    _check_settings(pathlib.Path(folder), tagger)

    mine = [_Job.of(file, folder, column) for file in files][process_id::num_processes]
    todo = [job for job in mine if not job.done()]
    totals = Totals(left_alone=len(mine) - len(todo))
    progress = _Progress(len(todo))
    waiting: dict[_Job, int] = {}
    said = _Said()
    for unit, outcome in _run(_units(todo, tagger, rows_per_part, waiting), workers):
        if isinstance(outcome, Exception):
            print(f"extract_labels: {unit.job.file}: {outcome}", file=sys.stderr)
            totals = totals.plus(failed=1)
            progress.show(totals, 1 / unit.parts)
            continue
        totals = totals.plus(**outcome.counts)
        said.add(unit, outcome)
        waiting[unit.job] -= 1
        if not waiting[unit.job]:
            _join(unit.job, unit.parts)
            totals = totals.plus(files=1)
        progress.show(totals, 1 / unit.parts)
    progress.close()
    return said.judge(totals)


class _Said:
    """What is said about bad captions: a few of them, and when there is nothing else."""

    def __init__(self):
        self._left, self._read, self._first = _SHOWN, False, ""

    def add(self, unit: _Unit, outcome: _Outcome) -> None:
        """After every part."""
        self._read |= outcome.counts.get("captions", 1) > outcome.counts.get("bad", 0)
        lines = [f"{unit.job.file}:{line}" for line in outcome.bad]
        self._first = self._first or next(iter(lines), "")
        for line in lines[: self._left]:
            print(f"extract_labels: {line}", file=sys.stderr)
        self._left = max(0, self._left - len(lines))

    def judge(self, totals: Totals) -> Totals:
        """At the end; files count as failed when nothing could be read of any."""
        if totals.files and not self._read:
            first = f"; the first: {self._first}" if self._first else ""
            print(
                f"extract_labels: not one caption could be read of {totals.files} files{first}",
                file=sys.stderr,
            )
            return totals.plus(failed=totals.files)
        if totals.captions > totals.bad and not totals.labels:
            print(
                f"extract_labels: warning: none of {totals.captions - totals.bad} captions gave a "
                "label; are they empty, or in another language than English?",
                file=sys.stderr,
            )
        return totals


class _Job(NamedTuple):
    """One input file and where its labels go.

    Attributes:
      file, target, note: input, output, and what the output was made of.
      column: see `caption_files`.
      stamp: JSON of what a note says when nothing has changed.
    """

    file: pathlib.Path
    target: pathlib.Path
    note: pathlib.Path
    column: str
    stamp: str

    @classmethod
    def of(cls, file: pathlib.Path, folder: str, column: str) -> _Job:
        """The job of a file as it is now."""
        from vlm_jax.datasets import caption_shards

        target = caption_shards.labels_file(folder, file)
        note = caption_shards.note_file(folder, file)
        stamp = json.dumps({**caption_shards.stamp(file), "column": column})
        return cls(file, target, note, column, stamp)

    def done(self) -> bool:
        """Whether the labels are there and were made of this content."""
        try:
            return self.target.is_file() and self.note.read_text(encoding="utf-8") == self.stamp
        except (OSError, UnicodeDecodeError):
            return False

    def part(self, part: int, parts: int) -> pathlib.Path:
        """Of this content; another one has parts of other names."""
        content = hashlib.sha256(self.stamp.encode()).hexdigest()[:12]
        return self.target.with_name(f".{self.target.name}.{content}.part{part}of{parts}")


class _Unit(NamedTuple):
    """One part of one file: its rows [start, stop), or why they cannot be read."""

    job: _Job
    tagger: str
    part: int
    parts: int
    start: int
    stop: int | None
    error: Exception | None = None

    @property
    def output(self) -> pathlib.Path:
        return self.job.part(self.part, self.parts)


class _Outcome(NamedTuple):
    """Counts for `Totals` (none for a part that was there), and the first bad captions."""

    counts: dict[str, int]
    bad: list[str]


def _units(todo, tagger, rows_per_part, waiting) -> Iterator[_Unit]:
    for job in todo:
        parts, bounds, error = 1, [(0, None)], None
        if caption_files.form_of(job.file) != ".tar":  # a line file may hold everything
            try:
                count = caption_files.count(job.file, job.column)
                parts = min(_MAX_PARTS, max(1, -(-count // rows_per_part)))
                bounds = [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
            except (ValueError, OSError) as unreadable:
                error = unreadable  # said by the part, which reads nothing
        waiting[job] = parts
        for part, (start, stop) in enumerate(bounds):
            yield _Unit(job, tagger, part, parts, start, stop, error)


def _run(units: Iterator[_Unit], workers: int) -> Iterator[tuple[_Unit, Any]]:
    if not workers:
        for unit in units:
            yield unit, _try(unit)
        return
    # Not forked: the parent may have threads. A few units ahead of the workers are enough.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        running = {}
        for unit in itertools.islice(units, 2 * workers):
            running[pool.submit(_try, unit)] = unit
        while running:
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in done:
                yield running.pop(future), future.result()
                for unit in itertools.islice(units, 1):
                    running[pool.submit(_try, unit)] = unit


def _try(unit: _Unit) -> _Outcome | Exception:
    if unit.error:
        return unit.error
    try:
        return _extract(unit)
    except (ValueError, OSError) as error:
        return error


def _extract(unit: _Unit) -> _Outcome:
    """Writes one part."""
    from vlm_jax.systems.nxtp import labels

    if unit.output.is_file():  # before a kill
        return _Outcome({}, [])
    tagger = labels.make_tagger(unit.tagger)
    counts = dict(captions=0, labels=0, without=0, bad=0)
    bad = caption_files.notes(unit.job.file)[:_SHOWN]
    unit.output.parent.mkdir(parents=True, exist_ok=True)
    partial = unit.output.with_name(f"{unit.output.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            rows = caption_files.rows(unit.job.file, unit.job.column, unit.start, unit.stop)
            for key, read in rows:
                counts["captions"] += 1
                line: dict[str, Any] = {"key": key}
                try:
                    line["labels"] = labels.of_record(read(), tagger)
                    counts["labels"] += len(line["labels"])
                    counts["without"] += not line["labels"]
                except ValueError as error:
                    line["error"] = str(error)[:200]
                    counts["bad"] += 1
                    bad += [f"{key}: {line['error']}"] if len(bad) < _SHOWN else []
                stream.write(json.dumps(line) + "\n")
        os.replace(partial, unit.output)
    finally:
        partial.unlink(missing_ok=True)
    return _Outcome(counts, bad)


def _join(job: _Job, parts: int) -> None:
    files = [job.part(part, parts) for part in range(parts)]
    partial = job.target.with_name(f".{job.target.name}.{os.getpid()}")
    with partial.open("wb") as stream:
        for file in files:
            with file.open("rb") as part:
                shutil.copyfileobj(part, stream)
    job.note.parent.mkdir(parents=True, exist_ok=True)
    job.note.unlink(missing_ok=True)  # a kill here makes the file once more
    os.replace(partial, job.target)
    job.note.write_text(job.stamp, encoding="utf-8")
    # Also those of an earlier content, which nobody will ask for.
    for file in job.target.parent.glob(f".{glob.escape(job.target.name)}.*.part*of*"):
        file.unlink(missing_ok=True)


def _check_settings(folder: pathlib.Path, tagger: str) -> None:
    from vlm_jax.data import records
    from vlm_jax.systems.nxtp import labels

    settings = {"tagger": tagger, "removed": list(labels.REMOVED), "version": _VERSION}
    file = folder / _SETTINGS
    if file.is_file():
        try:
            found = records.parse_json(file.read_bytes())
        except records.BadRecordError as error:
            raise records.DataError(f"{file}: {error}") from error
        if found != settings:
            raise records.DataError(
                f"{folder} was written with {found}, now it would be {settings}; give another --to"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{_SETTINGS}.{os.getpid()}"
    partial.write_text(json.dumps(settings) + "\n")
    os.replace(partial, file)


class _Progress:
    """A bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, files: int):
        self._files, self._start_s, self._shown_s = files, time.monotonic(), time.monotonic()
        self._done = 0.0  # files, parts of them counted

    def show(self, totals: Totals, more: float) -> None:
        self._done += more
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if not terminal and now - self._shown_s < _PLAIN_EVERY_S:
            return
        self._shown_s = now
        done = self._done / self._files
        spent_s = now - self._start_s
        left_s = spent_s * (1 - done) / done
        text = (
            f"{totals.files}/{self._files} files  {totals.captions:,} captions  "
            f"{totals.captions / max(spent_s, 1e-9):,.0f}/s  {left_s / 60:.0f} min left"
        )
        bar = f"[{'#' * int(20 * done):20}] "
        print(f"\r{bar}{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr)

    def close(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
