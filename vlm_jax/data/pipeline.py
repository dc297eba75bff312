"""From sources to global batches whose content depends only on (config, seed, step).

    sources --mixture, shuffle--> records --formatter--> examples --batch--> Batch
                                       \\--packing-----> rows ----/

Row r of step s is element s * batch_size + r (counted on from where it stood when the batch size
changed) of an endless sequence that any process can compute at any place, so hosts, threads,
workers and restarts only choose which elements are computed where. grain runs the elements ahead
of time in threads or processes.

Mixture weights are shares of rows: of examples without packing, of tokens with it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax import config as config_lib
from vlm_jax.data import order, packing, records, sidecar, sources

_MAX_CAUSE = 500  # letters of a message that are kept: records may hold anything


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, in which proportions, and how hard the host works.

    Attributes:
      mixture: name -> dict(type=..., weight=1.0, and the fields of the source); see sources.py.
      packing: "none", one record per row; "stream" or "documents", see packing.py.
      shuffle: a fresh permutation per epoch; False keeps file order.
      num_threads: threads that read and format.
      num_workers: processes instead of threads; they take seconds to start and pay off only for
        heavy decoding on many cores. The starting script needs a `__main__` guard.
      prefetch_batches: batches made ahead, which bounds the memory.
      max_bad_fraction: of the records; above it the run stops. 0 stops at the first.
    """

    mixture: Mapping[str, Mapping[str, Any]]
    packing: str = "none"
    shuffle: bool = True
    num_threads: int = 8
    num_workers: int = 0
    prefetch_batches: int = 2
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        kinds = ("none", *packing.PLANS)
        if self.packing not in kinds:
            raise ValueError(f"packing={self.packing!r} is not one of {', '.join(kinds)}")
        if not self.mixture:
            raise ValueError("mixture is empty; name at least one source")
        for name, entry in self.mixture.items():
            if not isinstance(entry, Mapping):
                raise ValueError(f"mixture.{name}={entry!r:.60} is not a dict with a 'type'")
            if "type" not in entry:
                raise ValueError(f"mixture.{name} has no 'type'; known: {', '.join(sources.TYPES)}")
            weight = entry.get("weight", 1.0)
            if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(f"mixture.{name}.weight={weight!r} must be a positive number")
        config_lib.check_ranges(
            self,
            num_threads=(0, 1024),
            num_workers=(0, 1024),
            prefetch_batches=(0, math.inf),
            max_bad_fraction=(0, 1),
        )


@dataclasses.dataclass
class Batch:
    """The wanted rows of one global batch.

    Attributes:
      step: of the batch, from 0.
      arrays: key -> array [rows, ...]. Without packing there is also valid bool[rows], False for
        a row whose record could not be read; all arrays of such a row are 0.
      record_ids: per row, the records that it is made of.
    """

    step: int
    arrays: dict[str, np.ndarray]
    record_ids: list[list[str]]


def make_batches(
    config: DataConfig,
    formatter: Any,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    start_row: int | None = None,
    rows: np.ndarray | None = None,
) -> Batches:
    """Endless batches from `start_step` on.

    Args:
      config: the `data` section.
      formatter: record, rng -> example of fixed shapes. With packing: `encode(record)` gives ids
        and weights, `max_tokens` is the length of a row.
      batch_size: rows of the global batch.
      seed: of the run.
      start_step: of the first batch.
      start_row: rows of all steps before it; None is `start_step * batch_size`, right for a run
        whose batches always had this size.
      rows: which rows of the global batch this process needs; None is all.

    Raises:
      DataError: a file is missing, a source is empty, too many records are bad, or a record does
        not fit the formatter.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    start_row = start_step * batch_size if start_row is None else start_row
    table = _Rows(config, formatter, seed)
    return Batches(config, formatter, _Endless(table, batch_size, rows, start_row), start_step)


def one_pass(
    config: DataConfig,
    formatter: Any,
    *,
    batch_size: int,
    max_batches: int = 0,
    seed: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Every record once in file order, source after source, as whole batches (for evaluation).

    A batch is its arrays and `record_ids`, the names of the records of every row. The last batch
    is filled up with rows of zeros, whose weights (or `valid`) are 0.

    Args: as `make_batches`; max_batches: stop early, 0 reads everything.
    """
    table = _Rows(dataclasses.replace(config, shuffle=False), formatter, seed)
    batches = Batches(config, formatter, _OnePass(table, batch_size, max_batches), 0)
    try:
        for batch in batches:
            yield {**batch.arrays, "record_ids": batch.record_ids}
    finally:
        batches.close()


class BadRecords:
    """Counts and names records that cannot be used, and stops the run when they are too many.

    Attributes:
      seen: records read so far, repeats included.
      count: bad ones among them.
      causes: id -> cause of every distinct bad record, those left out by an index included.
    """

    def __init__(self, max_fraction: float, total: int, skipped: Sequence[tuple[str, str]]):
        self.seen = self.count = 0
        self.causes: dict[str, str] = {}
        self._max_fraction, self._total = max_fraction, total
        for name, cause in skipped:
            self._name(name, cause)
        # Here bad records of the token count are among `total`; for the fraction it hardly matters.
        _stop_if_too_many(max_fraction, len(skipped), total + len(skipped), self.causes)

    def add(self, seen: int, bad: Sequence[tuple[str, str]]) -> None:
        """Raises DataError when more than the allowed fraction is bad."""
        self.seen += seen
        self.count += len(bad)
        for name, cause in bad:
            self._name(name, cause)
        # A few bad records say little about the fraction before all records were seen.
        now = self.seen >= self._total > self.seen - seen
        if now or bad and (self.count > 10 or self.seen >= self._total or not self._max_fraction):
            _stop_if_too_many(self._max_fraction, self.count, self.seen, self.causes)

    def _name(self, name: str, cause: str) -> None:
        if name not in self.causes:
            self.causes[name] = cause = cause[:_MAX_CAUSE]
            print(f"vlm_jax: bad record {len(self.causes)}: {name}: {cause}", file=sys.stderr)


def _stop_if_too_many(max_fraction: float, bad: int, of: int, causes: Mapping[str, str]) -> None:
    if bad <= max_fraction * of:
        return
    named = [f"  {name}: {cause}" for name, cause in itertools.islice(causes.items(), 8)]
    if len(causes) > len(named):
        named.append(f"  and {len(causes) - len(named)} more")
    raise records.DataError(
        f"{bad} of {of} records cannot be used, more than data.max_bad_fraction={max_fraction}:\n"
        + "\n".join(named)
    )


class Batches:
    """Iterator of `Batch`, made ahead in the background; `close()` ends the threads.

    Attributes:
      bad_records: what could not be used so far, see `BadRecords`.
      records_of: source -> its number of records, on which its order depends.
    """

    def __init__(self, config: DataConfig, formatter: Any, elements: Any, start_step: int):
        table = elements.table
        self.bad_records = BadRecords(
            config.max_bad_fraction, sum(table.records_of.values()), table.skipped
        )
        self.records_of = table.records_of
        self._formatter, self._step = formatter, start_step
        self._rows = elements.rows_per_batch
        self._iterator = _run_ahead(config, elements, self._rows)
        self._closed = False

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        rows = list(itertools.islice(self._iterator, self._rows))
        if len(rows) < self._rows:
            raise StopIteration
        for row in rows:
            self.bad_records.add(row.seen, row.bad)
        examples = [row.example for row in rows]
        arrays = getattr(self._formatter, "batch", _stack)(examples)
        batch = Batch(self._step, arrays, [row.record_ids for row in rows])
        self._step += 1
        return batch

    def close(self) -> None:
        """Ends the background work. Safe to call twice."""
        if not self._closed:
            self._closed = True
            getattr(self._iterator, "close", lambda: None)()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _stack(examples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _run_ahead(config: DataConfig, elements: Any, rows: int) -> Iterator[_Row]:
    grain = records.require("grain")
    options = grain.ReadOptions(
        num_threads=config.num_threads,
        prefetch_buffer_size=max(rows * config.prefetch_batches, config.num_threads),
    )
    dataset = grain.MapDataset.source(elements).to_iter_dataset(options)
    if config.num_workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read flags; a notebook has none
        ahead = -(-rows * config.prefetch_batches // config.num_workers)
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.num_workers, per_worker_buffer_size=ahead
            ),
            worker_init_fn=_begin_worker,
        )
    return iter(dataset)


def _begin_worker(index: int, count: int) -> None:
    """Ties a worker process to its trainer, however that ends.

    The trainer ends its workers itself, except when it is killed. Once the last of them has gone,
    Python's resource tracker frees their shared memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's affair
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=end_with_parent, daemon=True).start()


class _Row(NamedTuple):
    """One element on its way to a batch."""

    example: dict[str, np.ndarray]
    record_ids: list[str]
    seen: int = 0
    bad: tuple[tuple[str, str], ...] = ()


class _Entry(NamedTuple):
    source: sources.Source
    shuffle: order.Shuffle
    plan: packing.StreamPlan | packing.DocumentPlan | None


class _Rows:
    """Any row of any source: (name, number) -> _Row. Picklable."""

    def __init__(self, config: DataConfig, formatter: Any, seed: int):
        self._formatter, self._seed, self._packing = formatter, seed, config.packing
        self.mixture = order.Mixture(
            {name: entry.get("weight", 1.0) for name, entry in config.mixture.items()}
        )
        self._entries: dict[str, _Entry] = {}
        self.skipped: list[tuple[str, str]] = []
        self.records_of: dict[str, int] = {}
        if config.packing != "none" and not hasattr(formatter, "encode"):
            raise records.DataError(
                f"data.packing={config.packing!r} needs a formatter with `encode` and "
                f"`max_tokens`; {type(formatter).__name__} has none, set data.packing='none'"
            )
        for name in self.mixture.names:
            fields = {key: x for key, x in config.mixture[name].items() if key != "weight"}
            source = sources.make_source(**fields)
            self.skipped += getattr(source, "skipped", ())
            if not len(source):
                skipped = len(getattr(source, "skipped", ()))
                raise records.DataError(
                    f"data.mixture.{name} is empty: no usable record in {fields}"
                    + (f" ({skipped} bad ones, first: {source.skipped[0]})" if skipped else "")
                )
            self.records_of[name] = len(source)
            shuffle = order.Shuffle(len(source), seed, name, config.shuffle)
            plan = None
            if config.packing != "none":
                lengths, bad = token_lengths(source, formatter)
                self.skipped += bad
                # Checked here already: without usable records there is nothing to plan.
                _stop_if_too_many(config.max_bad_fraction, len(bad), len(source), dict(bad))
                plan = packing.PLANS[config.packing](lengths, shuffle, formatter.max_tokens)
            self._entries[name] = _Entry(source, shuffle, plan)
        self._documents = _DocumentCache(self)

    def row(self, name: str, number: int, *, one_pass: bool = False) -> _Row:
        """The `number`-th row of one source."""
        entry = self._entries[name]
        return (
            self._packed(name, entry, number, one_pass)
            if entry.plan
            else self._example(name, entry, number)
        )

    def count(self, name: str) -> int:
        """Rows of one pass over a source."""
        entry = self._entries[name]
        return entry.plan.rows_per_pass if entry.plan else len(entry.source)

    def blank(self) -> _Row:
        """A row of zeros."""
        if self._packing != "none":
            return _Row(packing.blank_row(self._formatter.max_tokens), [])
        return _Row({**self._zeros, "valid": np.False_}, [])

    def _example(self, name: str, entry: _Entry, number: int) -> _Row:
        epoch, index = (int(x[0]) for x in entry.shuffle.locate(np.array([number])))
        record_id = entry.source.record_id(index)
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode()), epoch, index])
        with _naming(record_id):
            try:
                example = self._formatter(entry.source[index], rng)
            except records.BadRecordError as error:
                bad = ((record_id, str(error)),)
                return self.blank()._replace(record_ids=[record_id], seen=1, bad=bad)
        return _Row({**example, "valid": np.True_}, [record_id], 1)

    def _packed(self, name: str, entry: _Entry, number: int, one_pass: bool) -> _Row:
        pieces = entry.plan.pieces(number, one_pass=one_pass)
        example = entry.plan.fill(pieces, lambda piece: self._documents(name, piece.index))
        bad = []
        for index in dict.fromkeys(piece.index for piece in pieces):
            document = self._documents(name, index)
            if document.ids is None:
                bad.append((entry.source.record_id(index), document.error))
        record_ids = [entry.source.record_id(piece.index) for piece in pieces]
        return _Row(example, record_ids, len(pieces), tuple(bad))

    def load_document(self, name: str, index: int) -> packing.Document:
        """Ids and weights of one record, or why there are none."""
        source, _, plan = self._entries[name]
        with _naming(source.record_id(index)):
            try:
                ids, weights = self._formatter.encode(source[index])
            except records.BadRecordError as error:
                return packing.Document(None, None, str(error))
        if len(ids) != plan.lengths[index]:
            changed = f"{len(ids)} ids, and {plan.lengths[index]} when they were counted"
            return packing.Document(None, None, changed)
        return packing.Document(ids, weights)

    @functools.cached_property
    def _zeros(self) -> dict[str, np.ndarray]:
        """The shapes of an example, from the first record that can be formatted."""
        first = ""
        for entry in self._entries.values():
            for index in range(min(len(entry.source), 1000)):
                try:
                    example = self._formatter(entry.source[index], np.random.default_rng(0))
                except records.BadRecordError as error:
                    first = first or f"{entry.source.record_id(index)}: {error}"
                    continue
                return {key: np.zeros_like(x) for key, x in example.items()}
        raise records.DataError(
            f"none of the first 1000 records of any source can be formatted; the first: {first}"
        )


class _DocumentCache:
    """The documents used last: neighbouring rows share them. Thread-safe, pickled empty."""

    def __init__(self, table: _Rows, size: int = 512, most_ids: int = 2**24):
        self._table, self._size, self._most_ids = table, size, most_ids
        self._kept: collections.OrderedDict[tuple[str, int], packing.Document]
        self._kept, self._lock = collections.OrderedDict(), threading.Lock()
        self._ids = 0  # of all that are kept: a document may be as long as a file

    def __reduce__(self):
        return _DocumentCache, (self._table, self._size, self._most_ids)

    def __call__(self, name: str, index: int) -> packing.Document:
        with self._lock:
            if (name, index) in self._kept:
                self._kept.move_to_end((name, index))
                return self._kept[name, index]
        document = self._table.load_document(name, index)
        with self._lock:
            if (name, index) not in self._kept:  # another thread may have been as fast
                self._kept[name, index] = document
                self._ids += _num_ids(document)
            while len(self._kept) > self._size or self._ids > self._most_ids:
                self._ids -= _num_ids(self._kept.popitem(last=False)[1])
        return document


def _num_ids(document: packing.Document) -> int:
    return 0 if document.ids is None else len(document.ids)


class _naming:
    """Puts the record's name before the message of what ends the run."""

    def __init__(self, record_id: str):
        self._record_id = record_id

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, records.DataError):
            raise records.DataError(f"{self._record_id}: {error}") from error
        if error is not None:
            error.add_note(f"while reading {self._record_id}")


def token_lengths(
    source: sources.Source, formatter: Any
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Ids per record, int64[N], 0 for unusable ones, and those as (id, cause); kept with the index.

    Raises:
      DataError: a record that does not fit the formatter, for example ids of another codebook.
    """

    def build() -> dict[str, np.ndarray]:
        lengths, bad, causes = np.zeros(len(source), np.int64), [], []
        if len(source) > 10_000:
            print(f"vlm_jax: counting the tokens of {len(source)} records (once)", file=sys.stderr)
        for index in range(len(source)):
            with _naming(source.record_id(index)):
                try:
                    lengths[index] = len(formatter.encode(source[index])[0])
                except records.BadRecordError as error:
                    bad.append(index)
                    causes.append(str(error)[:_MAX_CAUSE])
        return {
            "lengths": lengths,
            "bad": np.array(bad, np.int64),
            "causes": np.array(causes, np.str_),
        }

    fingerprint = getattr(source, "fingerprint", lambda: None)()
    # A formatter that is no dataclass does not show its settings, so nothing can be kept for it.
    if fingerprint is None or not dataclasses.is_dataclass(formatter):
        arrays = build()
    else:
        key = [fingerprint, type(formatter).__module__, repr(formatter)]
        arrays = sidecar.load("lengths-2", key, build)
    bad = [
        (source.record_id(int(i)), str(cause)) for i, cause in zip(arrays["bad"], arrays["causes"])
    ]
    return arrays["lengths"], bad


class _Endless:
    """The rows that one process needs, step after step: what grain indexes."""

    def __init__(self, table: _Rows, batch_size: int, rows: np.ndarray, start_row: int):
        self.table, self.rows_per_batch = table, len(rows)
        self._batch_size, self._rows, self._start_row = batch_size, rows, start_row

    def __len__(self) -> int:
        return 2**48  # grain wants a length; no run is longer

    def __getitem__(self, index: int) -> _Row:
        step, row = divmod(int(index), len(self._rows))
        number = self._start_row + step * self._batch_size + int(self._rows[row])
        return self.table.row(*self.table.mixture.locate(number))


class _OnePass:
    """All rows of all sources once, then blank rows up to whole batches."""

    def __init__(self, table: _Rows, batch_size: int, max_batches: int):
        self.table, self.rows_per_batch = table, batch_size
        self._names = table.mixture.names
        self._ends = np.cumsum([table.count(name) for name in self._names])
        batches = -(-int(self._ends[-1]) // batch_size)
        self.num_batches = min(batches, max_batches) if max_batches else batches

    def __len__(self) -> int:
        return self.num_batches * self.rows_per_batch

    def __getitem__(self, index: int) -> _Row:
        at = int(np.searchsorted(self._ends, index, side="right"))
        if at == len(self._names):
            return self.table.blank()
        number = int(index) - (int(self._ends[at - 1]) if at else 0)
        return self.table.row(self._names[at], number, one_pass=True)
