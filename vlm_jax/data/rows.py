"""Any row of any source: what `pipeline` deals to batches."""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
import threading
import zlib
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import bad_records, order, packing, records, sidecar, sources


class Row(NamedTuple):
    """One element on its way to a batch."""

    example: dict[str, np.ndarray]
    record_ids: list[str]
    seen: int = 0
    bad: tuple[tuple[str, str], ...] = ()


class _Entry(NamedTuple):
    source: sources.Source
    shuffle: order.Shuffle
    plan: packing.StreamPlan | packing.DocumentPlan | None


class Rows:
    """Any row of any source: (name, number) -> Row. Picklable.

    Args:
      config: `pipeline.DataConfig`. formatter, seed: as `pipeline.make_batches`.

    Attributes:
      mixture: of the sources. skipped: records left out by an index, as (id, cause).
      records_of: name -> number of records.

    Raises:
      DataError: see `pipeline.make_batches`.
    """

    def __init__(self, config: Any, formatter: Any, seed: int):
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
                bad_records.stop_if_too_many(
                    config.max_bad_fraction, len(bad), len(source), dict(bad)
                )
                plan = packing.PLANS[config.packing](lengths, shuffle, formatter.max_tokens)
            self._entries[name] = _Entry(source, shuffle, plan)
        self._documents = _DocumentCache(self)

    def row(self, name: str, number: int, *, one_pass: bool = False) -> Row:
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

    def blank(self) -> Row:
        """A row of zeros."""
        if self._packing != "none":
            return Row(packing.blank_row(self._formatter.max_tokens), [])
        return Row({**self._zeros, "valid": np.False_}, [])

    def _example(self, name: str, entry: _Entry, number: int) -> Row:
        epoch, index = (int(x[0]) for x in entry.shuffle.locate(np.array([number])))
        record_id = entry.source.record_id(index)
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode()), epoch, index])
        with bad_records.naming(record_id):
            try:
                example = self._formatter(entry.source[index], rng)
            except records.BadRecordError as error:
                bad = ((record_id, str(error)),)
                return self.blank()._replace(record_ids=[record_id], seen=1, bad=bad)
        return Row({**example, "valid": np.True_}, [record_id], 1)

    def _packed(self, name: str, entry: _Entry, number: int, one_pass: bool) -> Row:
        pieces = entry.plan.pieces(number, one_pass=one_pass)
        example = entry.plan.fill(pieces, lambda piece: self._documents(name, piece.index))
        bad = []
        for index in dict.fromkeys(piece.index for piece in pieces):
            document = self._documents(name, index)
            if document.ids is None:
                bad.append((entry.source.record_id(index), document.error))
        record_ids = [entry.source.record_id(piece.index) for piece in pieces]
        return Row(example, record_ids, len(pieces), tuple(bad))

    def load_document(self, name: str, index: int) -> packing.Document:
        """Ids and weights of one record, or why there are none."""
        source, _, plan = self._entries[name]
        with bad_records.naming(source.record_id(index)):
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

    def __init__(self, table: Rows, size: int = 512, most_ids: int = 2**24):
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
            with bad_records.naming(source.record_id(index)):
                try:
                    lengths[index] = len(formatter.encode(source[index])[0])
                except records.BadRecordError as error:
                    bad.append(index)
                    causes.append(str(error)[: bad_records.MAX_CAUSE])
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
