"""Any row of any source: what `pipeline` deals to batches."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax import answer
from vlm_jax.data import bad_records, order, packing, records, sidecar, sources


class Place(NamedTuple):
    """What a row is made of: records of a source. A row of zeros has none."""

    source: str
    indices: Sequence[int]


@dataclasses.dataclass
class Origin:
    """Where the rows of a chunk come from.

    Attributes:
      places: of every row.
      bad: row -> (record id, cause) of the records that it should hold and that cannot be used.
      hosts: row -> what its formatter keeps on the host, where that is wanted.
    """

    places: list[Place]
    bad: dict[int, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    hosts: dict[int, answer.Host] = dataclasses.field(default_factory=dict)


class Chunk(NamedTuple):
    """Rows on their way to a batch: key -> array [rows, ...], and their origin."""

    arrays: dict[str, np.ndarray]
    origin: Origin


class _Entry(NamedTuple):
    source: sources.Source
    shuffle: order.Shuffle
    plan: packing.StreamPlan | packing.DocumentPlan | None


class Rows:
    """Any rows of any sources. Picklable.

    Args:
      config: `pipeline.DataConfig`. formatter, seed: as `pipeline.make_batches`.
      keep_hosts: keep what examples have under "host"; training has no use for it.

    Attributes:
      mixture: of the sources. skipped: records left out by an index, as (id, cause).
      records_of: name -> number of records.

    Raises:
      DataError: see `pipeline.make_batches`.
    """

    def __init__(self, config: Any, formatter: Any, seed: int, keep_hosts: bool = False):
        self._formatter, self._seed, self._packing = formatter, seed, config.packing
        self.keeps_hosts = keep_hosts
        self._entries: dict[str, _Entry] = {}
        self.skipped: list[tuple[str, str]] = []
        self.records_of: dict[str, int] = {}
        if config.packing != "none" and not hasattr(formatter, "encode"):
            raise records.DataError(
                f"data.packing={config.packing!r} needs a formatter with `encode` and "
                f"`max_tokens`; {type(formatter).__name__} has none, set data.packing='none'"
            )
        for name in sorted(config.mixture):
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
        self.mixture = self._mixture(config.mixture)
        self._documents = _DocumentCache(self)

    def _mixture(self, entries: Mapping[str, Mapping[str, Any]]) -> order.Mixture:
        weights = {name: entry.get("weight", 1.0) for name, entry in entries.items()}
        if "records" in weights.values():
            weights = dict(self.records_of)
        try:
            return order.Mixture(weights)
        except ValueError as error:
            raise records.DataError(f"data.mixture: {error}") from error

    def chunk(self, owners: np.ndarray, numbers: np.ndarray, *, one_pass: bool = False) -> Chunk:
        """Some rows.

        Args:
          owners: int[n], the source of each as its place in `mixture.names`; -1 is a row of zeros.
          numbers: int64[n], which of the source's rows.
          one_pass: nothing follows the last record.
        """
        if self._packing != "none":
            return self._packed(owners, numbers, one_pass)
        epochs, indices = self._records(owners, numbers)
        places = [
            Place(self.mixture.names[owner], (index,)) if owner >= 0 else Place("", ())
            for owner, index in zip(owners.tolist(), indices.tolist())
        ]
        if hasattr(self._formatter, "format_many"):
            with contextlib.suppress(Exception):  # one by one, below, the record will be named
                return self._formatted(owners, indices, places)
        return self._one_by_one(epochs, places)

    def record_id(self, source: str, index: int) -> str:
        """How messages call a record."""
        return self._entries[source].source.record_id(index)

    def count(self, name: str) -> int:
        """Rows of one pass over a source."""
        entry = self._entries[name]
        return entry.plan.rows_per_pass if entry.plan else len(entry.source)

    def _records(self, owners: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices of the records of these rows."""
        epochs, indices = np.zeros(len(owners), np.int64), np.zeros(len(owners), np.int64)
        for owner, here in _by_source(owners):
            shuffle = self._entries[self.mixture.names[owner]].shuffle
            epochs[here], indices[here] = shuffle.locate(numbers[here])
        return epochs, indices

    def _formatted(self, owners: np.ndarray, indices: np.ndarray, places: list[Place]) -> Chunk:
        unread: dict[int, records.BadRecordError] = {}
        found = self._read(owners, indices, places, unread)
        arrays, unfit = self._formatter.format_many(found, len(places))
        errors = unread | unfit
        bad = {row: [self._bad(places[row], error)] for row, error in errors.items()}
        valid = owners >= 0
        valid[list(errors)] = False
        return Chunk({**arrays, "valid": valid}, Origin(places, bad))

    def _read(
        self,
        owners: np.ndarray,
        indices: np.ndarray,
        places: list[Place],
        errors: dict[int, records.BadRecordError],
    ) -> Iterator[records.Record | None]:
        """Record after record, as some are large; None, and an error, where there is none."""
        read: dict[int, Any] = {}
        for owner, here in _by_source(owners):
            source = self._entries[self.mixture.names[owner]].source
            if hasattr(source, "read_many"):
                read.update(zip(here.tolist(), source.read_many(indices[here]), strict=True))
        for row, place in enumerate(places):
            record = read.pop(row, None)
            if record is None and place.indices:
                try:
                    record = self._entries[place.source].source[place.indices[0]]
                except records.BadRecordError as error:
                    record = error
            if isinstance(record, records.BadRecordError):
                errors[row], record = record, None
            yield record

    def _one_by_one(self, epochs: np.ndarray, places: list[Place]) -> Chunk:
        examples, valid, origin = [], np.zeros(len(places), bool), Origin(places)
        for row, (epoch, place) in enumerate(zip(epochs.tolist(), places)):
            example = None
            for index in place.indices:
                source = self._entries[place.source].source
                rng = _Draws([self._seed, zlib.crc32(place.source.encode()), epoch, index])
                with bad_records.naming(source, index):
                    try:
                        example = self._formatter(source[index], rng)
                        host = example.pop("host", None)
                        valid[row] = True
                        if host is not None and self.keeps_hosts:
                            origin.hosts[row] = host
                    except records.BadRecordError as error:
                        origin.bad[row] = [self._bad(place, error)]
            examples.append(self._zeros if example is None else example)
        arrays = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        return Chunk({**arrays, "valid": valid}, origin)

    def _bad(self, place: Place, error: records.BadRecordError) -> tuple[str, str]:
        return self.record_id(place.source, place.indices[0]), str(error)

    def _packed(self, owners: np.ndarray, numbers: np.ndarray, one_pass: bool) -> Chunk:
        arrays = packing.blank_rows(len(owners), self._formatter.max_tokens)
        origin = Origin([])
        for row, (owner, number) in enumerate(zip(owners.tolist(), numbers.tolist())):
            if owner < 0:
                origin.places.append(Place("", ()))
                continue
            name = self.mixture.names[owner]
            plan = self._plan(name)
            pieces = plan.pieces(number, one_pass=one_pass)
            documents = {piece.index: self._documents(name, piece.index) for piece in pieces}
            views = {key: x[row] for key, x in arrays.items()}
            plan.fill(pieces, lambda piece: documents[piece.index], views)  # noqa: B023 - called here
            bad = [
                (self.record_id(name, index), document.error)
                for index, document in documents.items()
                if document.ids is None
            ]
            if bad:
                origin.bad[row] = bad
            origin.places.append(Place(name, [piece.index for piece in pieces]))
        return Chunk(arrays, origin)

    def _plan(self, name: str) -> packing.StreamPlan | packing.DocumentPlan:
        plan = self._entries[name].plan
        assert plan is not None  # rows are packed
        return plan

    def load_document(self, name: str, index: int) -> packing.Document:
        """Ids and weights of one record, or why there are none."""
        source, plan = self._entries[name].source, self._plan(name)
        with bad_records.naming(source, index):
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
                return {key: np.zeros_like(x) for key, x in example.items() if key != "host"}
        raise records.DataError(
            f"none of the first 1000 records of any source can be formatted; the first: {first}"
        )


class _Draws:
    """A `np.random.Generator` that is made when it is first asked: seeding takes longer than a row.

    Args:
      seed: as `np.random.default_rng` takes it.
    """

    def __init__(self, seed: Sequence[int]):
        self._seed = seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    @functools.cached_property
    def _generator(self) -> np.random.Generator:
        return np.random.default_rng(self._seed)


def _by_source(owners: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Every source that owns rows, and which they are."""
    for owner in np.unique(owners[owners >= 0]).tolist():
        yield owner, np.flatnonzero(owners == owner)


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
            with bad_records.naming(source, index):
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
