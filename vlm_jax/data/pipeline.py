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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax import config as config_lib
from vlm_jax.data import bad_records, packing, records, sources
from vlm_jax.data import rows as rows_lib


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
    table = rows_lib.Rows(config, formatter, seed)
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
    table = rows_lib.Rows(dataclasses.replace(config, shuffle=False), formatter, seed)
    batches = Batches(config, formatter, _OnePass(table, batch_size, max_batches), 0)
    try:
        for batch in batches:
            yield {**batch.arrays, "record_ids": batch.record_ids}
    finally:
        batches.close()


class Batches:
    """Iterator of `Batch`, made ahead in the background; `close()` ends the threads.

    Attributes:
      bad_records: what could not be used so far, see `bad_records.BadRecords`.
      records_of: source -> its number of records, on which its order depends.
    """

    def __init__(self, config: DataConfig, formatter: Any, elements: Any, start_step: int):
        table = elements.table
        self.bad_records = bad_records.BadRecords(
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


def _run_ahead(config: DataConfig, elements: Any, rows: int) -> Iterator[rows_lib.Row]:
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


class _Endless:
    """The rows that one process needs, step after step: what grain indexes."""

    def __init__(self, table: rows_lib.Rows, batch_size: int, rows: np.ndarray, start_row: int):
        self.table, self.rows_per_batch = table, len(rows)
        self._batch_size, self._rows, self._start_row = batch_size, rows, start_row

    def __len__(self) -> int:
        return 2**48  # grain wants a length; no run is longer

    def __getitem__(self, index: int) -> rows_lib.Row:
        step, row = divmod(int(index), len(self._rows))
        number = self._start_row + step * self._batch_size + int(self._rows[row])
        return self.table.row(*self.table.mixture.locate(number))


class _OnePass:
    """All rows of all sources once, then blank rows up to whole batches."""

    def __init__(self, table: rows_lib.Rows, batch_size: int, max_batches: int):
        self.table, self.rows_per_batch = table, batch_size
        self._names = table.mixture.names
        self._ends = np.cumsum([table.count(name) for name in self._names])
        batches = -(-int(self._ends[-1]) // batch_size)
        self.num_batches = min(batches, max_batches) if max_batches else batches

    def __len__(self) -> int:
        return self.num_batches * self.rows_per_batch

    def __getitem__(self, index: int) -> rows_lib.Row:
        at = int(np.searchsorted(self._ends, index, side="right"))
        if at == len(self._names):
            return self.table.blank()
        number = int(index) - (int(self._ends[at - 1]) if at else 0)
        return self.table.row(self._names[at], number, one_pass=True)
