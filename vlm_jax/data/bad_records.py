"""Records that cannot be used: counted, named once, and too many of them stop the run."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.data import records

MAX_CAUSE = 500  # letters of a message that are kept: records may hold anything


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
        stop_if_too_many(max_fraction, len(skipped), total + len(skipped), self.causes)

    def add(self, seen: int, bad: Sequence[tuple[str, str]]) -> None:
        """Raises DataError when more than the allowed fraction is bad."""
        self.seen += seen
        self.count += len(bad)
        for name, cause in bad:
            self._name(name, cause)
        # A few bad records say little about the fraction before all records were seen.
        now = self.seen >= self._total > self.seen - seen
        if now or bad and (self.count > 10 or self.seen >= self._total or not self._max_fraction):
            stop_if_too_many(self._max_fraction, self.count, self.seen, self.causes)

    def _name(self, name: str, cause: str) -> None:
        if name not in self.causes:
            self.causes[name] = cause = cause[:MAX_CAUSE]
            print(f"vlm_jax: bad record {len(self.causes)}: {name}: {cause}", file=sys.stderr)


def stop_if_too_many(max_fraction: float, bad: int, of: int, causes: Mapping[str, str]) -> None:
    """Raises DataError, with the first causes, when more than the fraction of `of` is bad."""
    if bad <= max_fraction * of:
        return
    named = [f"  {name}: {cause}" for name, cause in itertools.islice(causes.items(), 8)]
    if len(causes) > len(named):
        named.append(f"  and {len(causes) - len(named)} more")
    raise records.DataError(
        f"{bad} of {of} records cannot be used, more than data.max_bad_fraction={max_fraction}:\n"
        + "\n".join(named)
    )


class naming:
    """Puts the record's name before the message of what ends the run.

    Args:
      source, index: of the record; its name is asked for when it is needed.
    """

    def __init__(self, source: Any, index: int):
        self._source, self._index = source, index

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        record_id = self._source.record_id(self._index)
        if isinstance(error, records.DataError):
            raise records.DataError(f"{record_id}: {error}") from error
        error.add_note(f"while reading {record_id}")
