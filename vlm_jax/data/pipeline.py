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

import dataclasses
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax import answer
from vlm_jax.data import bad_records, packing, records, sources
from vlm_jax.data import rows as rows_lib
from vlm_jax.program import config as config_lib

MAX_BATCH_SIZE = 1 << 24  # rows; more is a slip of the keyboard


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, in which proportions, and how hard the host works.

    Attributes:
      mixture: name -> dict(type=..., weight=1.0, form=..., and the fields of the source); see
        sources.py. weight="records", for all entries or for none, is in proportion to their sizes.
        form: what is to be made of a record, where a corpus can be told in several ways; it
        reaches the formatter as record["form"].
      packing: "none", one record per row; "stream" or "documents", see packing.py.
      shuffle: a fresh permutation per epoch; False keeps file order.
      num_threads: threads that read and format pictures; 0 is none beside the caller's. Rows of
        ids, which cost little, are made by one.
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
            _check_weight(name, entry.get("weight", 1.0))
            form = entry.get("form")
            if form is not None and (not isinstance(form, str) or not form):
                raise ValueError(f"mixture.{name}.form={form!r} is not a name")
        by_size = {name: x.get("weight") == "records" for name, x in self.mixture.items()}
        if any(by_size.values()) and not all(by_size.values()):
            other = next(name for name, is_size in by_size.items() if not is_size)
            raise ValueError(
                f'mixture.{other} has a weight in numbers beside others with weight="records"; '
                "numbers of records and weights cannot be compared: give all the one or the other"
            )
        config_lib.check_ranges(
            self,
            num_threads=(0, 1024),
            num_workers=(0, 1024),
            prefetch_batches=(0, math.inf),
            max_bad_fraction=(0, 1),
        )


def _check_weight(name: str, weight: Any) -> None:
    if weight == "records":
        return
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < float("inf"):
        raise ValueError(
            f'mixture.{name}.weight={weight!r} must be a positive number, or "records"'
        )


@dataclasses.dataclass
class Batch:
    """The wanted rows of one global batch.

    Attributes:
      step: of the batch, from 0.
      arrays: key -> array [rows, ...]. Without packing there is also valid bool[rows], False for
        a row whose record could not be read; all arrays of such a row are 0.
      places: per row, the records that it is made of.
      hosts: of `one_pass`, per row what stays on the host; its id names the row's records.
    """

    step: int
    arrays: dict[str, np.ndarray]
    places: list[rows_lib.Place]
    _name: Callable[[str, int], str]
    hosts: list[answer.Host] = dataclasses.field(default_factory=list)

    @property
    def record_ids(self) -> list[list[str]]:
        """The names of `places`."""
        return [[self._name(place.source, i) for i in place.indices] for place in self.places]


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
    config = _spread(config, formatter)
    rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    parts = _cut(rows, config)
    start_row = start_step * batch_size if start_row is None else start_row
    table = rows_lib.Rows(config, formatter, seed)
    return Batches(config, _Endless(table, batch_size, parts, start_row), start_step)


def one_pass(
    config: DataConfig,
    formatter: Any,
    *,
    batch_size: int,
    max_batches: int = 0,
    seed: int = 0,
    rows: np.ndarray | None = None,
) -> Generator[Batch, None, None]:
    """Every record once in file order, source after source, as whole batches (for evaluation).

    Batches have `hosts`. The last one is filled up with rows of zeros, whose weights (or `valid`)
    are 0.

    Args: as `make_batches`; max_batches: stop early, 0 reads everything.
    """
    config = dataclasses.replace(_spread(config, formatter), shuffle=False)
    rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    table = rows_lib.Rows(config, formatter, seed, keep_hosts=True)
    elements = _OnePass(table, batch_size, _cut(rows, config), max_batches)
    batches = Batches(config, elements, 0)
    try:
        yield from batches
    finally:
        batches.close()


class Batches:
    """Iterator of `Batch`, made ahead in the background; `close()` ends the threads.

    Attributes:
      bad_records: what could not be used so far, see `bad_records.BadRecords`.
      records_of: source -> its number of records, on which its order depends.
    """

    def __init__(self, config: DataConfig, elements: _Endless | _OnePass, start_step: int):
        table = elements.table
        self.bad_records = bad_records.BadRecords(
            config.max_bad_fraction, sum(table.records_of.values()), table.skipped
        )
        self.records_of = table.records_of
        self._record_id, self._step = table.record_id, start_step
        self._parts, self._keeps_hosts = len(elements.parts), table.keeps_hosts
        self._iterator = _run_ahead(config, elements)
        self._closed = False

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        chunks = list(itertools.islice(self._iterator, self._parts))
        if len(chunks) < self._parts:
            raise StopIteration
        for chunk in chunks:
            for row, place in enumerate(chunk.origin.places):
                self.bad_records.add(len(place.indices), chunk.origin.bad.get(row, ()))
        places = [place for chunk in chunks for place in chunk.origin.places]
        batch = Batch(self._step, _joined(chunks), places, self._record_id)
        if self._keeps_hosts:
            batch.hosts = _hosts(chunks, batch.record_ids)
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


def _joined(chunks: Sequence[rows_lib.Chunk]) -> dict[str, np.ndarray]:
    first, *others = (chunk.arrays for chunk in chunks)
    if not others:
        return first
    return {key: np.concatenate([x, *(y[key] for y in others)]) for key, x in first.items()}


def _hosts(chunks: Sequence[rows_lib.Chunk], names: list[list[str]]) -> list[answer.Host]:
    made = [
        chunk.origin.hosts.get(row, answer.Host())
        for chunk in chunks
        for row in range(len(chunk.origin.places))
    ]
    return [dataclasses.replace(host, id="+".join(of)) for host, of in zip(made, names)]


def _spread(config: DataConfig, formatter: Any) -> DataConfig:
    """With as many threads as pay: rows of ids are many short steps, which threads do in turns."""
    ids = config.packing != "none" or hasattr(formatter, "format_many")
    return dataclasses.replace(config, num_threads=1) if ids and config.num_threads else config


def _cut(rows: np.ndarray, config: DataConfig) -> list[np.ndarray]:
    """A chunk of a batch for every thread."""
    return np.array_split(rows, max(1, min(len(rows), config.num_threads)))


def _run_ahead(config: DataConfig, elements: _Endless | _OnePass) -> Iterator[rows_lib.Chunk]:
    grain = records.require("grain")
    ahead = len(elements.parts) * config.prefetch_batches
    options = grain.ReadOptions(
        num_threads=config.num_threads,
        prefetch_buffer_size=max(ahead, config.num_threads),
    )
    dataset = grain.MapDataset.source(elements).to_iter_dataset(options)
    if config.num_workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read flags; a notebook has none
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.num_workers,
                per_worker_buffer_size=max(1, -(-ahead // config.num_workers)),
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

    if parent is None:
        return

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class _Endless:
    """The rows that one process needs, chunk after chunk: what grain indexes.

    Args:
      parts: of the rows of a global batch, those of each chunk.
    """

    def __init__(
        self, table: rows_lib.Rows, batch_size: int, parts: list[np.ndarray], start_row: int
    ):
        self.table, self.parts = table, parts
        self._batch_size, self._start_row = batch_size, start_row

    def __len__(self) -> int:
        return 2**48  # grain wants a length; no run is longer

    def __getitem__(self, index: int) -> rows_lib.Chunk:
        step, part = divmod(int(index), len(self.parts))
        rows = self._start_row + step * self._batch_size + self.parts[part]
        return self.table.chunk(*self.table.mixture.deal(rows))


class _OnePass:
    """All rows of all sources once, then rows of zeros up to whole batches."""

    def __init__(
        self, table: rows_lib.Rows, batch_size: int, parts: list[np.ndarray], max_batches: int
    ):
        self.table, self.parts, self._batch_size = table, parts, batch_size
        counts = [table.count(name) for name in table.mixture.names]
        self._bounds = np.concatenate([[0], np.cumsum(counts)])
        batches = -(-int(self._bounds[-1]) // batch_size)
        self._batches = min(batches, max_batches) if max_batches else batches

    def __len__(self) -> int:
        return self._batches * len(self.parts)

    def __getitem__(self, index: int) -> rows_lib.Chunk:
        batch, part = divmod(int(index), len(self.parts))
        rows = batch * self._batch_size + self.parts[part]
        owners = np.searchsorted(self._bounds, rows, side="right") - 1
        numbers = rows - self._bounds[owners]
        owners[rows >= self._bounds[-1]] = -1
        return self.table.chunk(owners, numbers, one_pass=True)
