r"""Extracts the labels of captions once, ahead of training, for millions of captions.

    python -m vlm_jax.tools.extract_labels --path=data/cc3m/cc3m data/sbu/sbu --to=labels
    python -m vlm_jax.tools.extract_labels --path='captions/*.jsonl' --to=labels --tagger=textblob

Reads tar shards (STEM.txt), JSON Lines ("caption", "captions" or "txt") and text files (a caption a
line); a folder is searched for .tar. Writes one JSON Lines file per input file, which the data
source "caption_shards" takes as `labels=`. Every file appears complete or not at all: after a
kill, start the same command again, and what is done is left alone. A file changed since is done
again. Several machines share the work with --num_processes and --process_id.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_SETTINGS = "extraction.json"
_VERSION = 1  # of the rules and of the files
_PLAIN_EVERY_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 when a file could not be read."""
    parser = argparse.ArgumentParser(
        prog="extract_labels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--path", nargs="+", required=True, help="files, globs or folders")
    parser.add_argument("--to", required=True, help="folder for the labels")
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
            tagger=args.tagger,
            workers=args.workers,
            num_processes=args.num_processes,
            process_id=args.process_id,
            rows_per_part=args.rows_per_part,
        )
    except (records.DataError, records.MissingExtraError, OSError) as error:
        print(f"extract_labels: {error}", file=sys.stderr)
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
    tagger: str = "nltk",
    workers: int = 0,
    num_processes: int = 1,
    process_id: int = 0,
    rows_per_part: int = 50_000,
) -> Totals:
    """Writes the labels of all files of this process.

    Raises:
      DataError: no input, a folder that was written with other settings, two inputs of one name,
        the tagger's data are missing.
      MissingExtraError: the tagger is not installed.
    """
    from vlm_jax.data import records
    from vlm_jax.datasets import caption_shards
    from vlm_jax.systems.nxtp import labels

    if not 0 <= process_id < num_processes:
        raise records.DataError(f"process_id {process_id} is not below {num_processes}")
    labels.make_tagger(tagger)  # says at once when something is missing
    files = caption_shards.find_shards(path)
    targets = [caption_shards.labels_file(folder, file) for file in files]
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        both = [str(file) for file, target in zip(files, targets) if target == twice]
        raise records.DataError(f"{', '.join(both)} would share {twice}; give them another --to")
    _check_settings(pathlib.Path(folder), tagger)

    mine = list(zip(files, targets))[process_id::num_processes]
    todo = [pair for pair in mine if not _is_done(*pair)]
    totals = Totals(left_alone=len(mine) - len(todo))
    progress = _Progress(len(todo))
    waiting: dict[pathlib.Path, int] = {}
    for unit, outcome in _run(_units(todo, tagger, rows_per_part, waiting), workers):
        if isinstance(outcome, Exception):
            print(f"extract_labels: {unit.file}: {outcome}", file=sys.stderr)
            totals = totals.plus(failed=1)
            progress.show(totals, 1 / unit.parts)
            continue
        totals = totals.plus(**outcome)
        waiting[unit.target] -= 1
        if not waiting[unit.target]:
            _join(unit.target, unit.parts)
            totals = totals.plus(files=1)
        progress.show(totals, 1 / unit.parts)
    progress.close()
    return totals


class _Unit(NamedTuple):
    """One part of one file."""

    file: pathlib.Path
    target: pathlib.Path
    tagger: str
    part: int
    parts: int

    @property
    def output(self) -> pathlib.Path:
        return _part_file(self.target, self.part, self.parts)


def _units(todo, tagger, rows_per_part, waiting) -> Iterator[_Unit]:
    for file, target in todo:
        parts = 1
        if file.suffix != ".tar":  # a shard is small; a line file may hold everything
            parts = max(1, -(-_count_lines(file) // rows_per_part))
        waiting[target] = parts
        for part in range(parts):
            yield _Unit(file, target, tagger, part, parts)


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


def _try(unit: _Unit) -> dict[str, int] | Exception:
    try:
        return _extract(unit)
    except (ValueError, OSError) as error:
        return error


def _extract(unit: _Unit) -> dict[str, int]:
    """Writes one part; counts for `Totals`."""
    from vlm_jax.systems.nxtp import labels

    if _is_done(unit.file, unit.output):  # before a kill
        return {}
    tagger = labels.make_tagger(unit.tagger)
    counts = dict(captions=0, labels=0, without=0, bad=0)
    unit.output.parent.mkdir(parents=True, exist_ok=True)
    partial = unit.output.with_name(f".{unit.output.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for key, read in _captions(unit):
                counts["captions"] += 1
                line: dict[str, Any] = {"key": key}
                try:
                    line["labels"] = labels.of_record(read(), tagger)
                    counts["labels"] += len(line["labels"])
                    counts["without"] += not line["labels"]
                except ValueError as error:
                    line["error"] = str(error)[:200]
                    counts["bad"] += 1
                stream.write(json.dumps(line) + "\n")
        os.replace(partial, unit.output)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def _captions(unit: _Unit):
    """(key, function returning the record) of every caption of the part, in order."""
    from vlm_jax.data import sources

    name = f"{unit.file}:"
    if unit.file.suffix in (".tar", ".jsonl"):
        source = (
            sources.TarShards([str(unit.file)], members=("txt",))
            if unit.file.suffix == ".tar"
            else sources.JsonLines([str(unit.file)])
        )
        for index in _rows(len(source), unit):
            key = source.record_id(index).removeprefix(name)
            yield key, lambda index=index: _only_text(source[index])
        return
    with unit.file.open("rb") as stream:
        rows = _rows(_count_lines(unit.file), unit)
        for number, line in enumerate(itertools.islice(stream, rows.start, rows.stop), rows.start):
            yield str(number + 1), lambda line=line: {"txt": line.decode().strip()}


def _only_text(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("caption", "captions", "txt") if key in record}


def _rows(count: int, unit: _Unit) -> range:
    """The part's rows: parts differ by at most one row."""
    return range(count * unit.part // unit.parts, count * (unit.part + 1) // unit.parts)


def _count_lines(file: pathlib.Path) -> int:
    count, last = 0, b"\n"
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _part_file(target: pathlib.Path, part: int, parts: int) -> pathlib.Path:
    if parts == 1:
        return target
    return target.with_name(f".{target.name}.part{part}of{parts}")


def _join(target: pathlib.Path, parts: int) -> None:
    if parts == 1:
        return
    files = [_part_file(target, part, parts) for part in range(parts)]
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    with partial.open("wb") as stream:
        for file in files:
            stream.write(file.read_bytes())
    os.replace(partial, target)
    for file in files:
        file.unlink()


def _is_done(file: pathlib.Path, target: pathlib.Path) -> bool:
    return target.is_file() and target.stat().st_mtime_ns >= file.stat().st_mtime_ns


def _check_settings(folder: pathlib.Path, tagger: str) -> None:
    from vlm_jax.data import records
    from vlm_jax.systems.nxtp import labels

    settings = {"tagger": tagger, "removed": list(labels.REMOVED), "version": _VERSION}
    file = folder / _SETTINGS
    if file.is_file():
        found = json.loads(file.read_text())
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
