"""Many inputs through a slow reader and a batched function, with few of them in memory."""

from __future__ import annotations

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from vlm_jax.data import records

T = TypeVar("T")

THREADS = min(8, 2 * (os.cpu_count() or 1))


def prepared(
    items: Iterable[Any], prepare: Callable[[Any], T], *, threads: int = THREADS, ahead: int = 64
) -> Iterator[T | records.BadRecordError]:
    """`prepare` of each item, in order, computed in threads.

    Args:
      items: may have no end; at most `ahead` are taken before their turn.
      prepare: may raise BadRecordError, which is yielded in the place of the result.
      threads: that many calls run side by side.
      ahead: results that wait at most.
    """

    def attempt(item):
        try:
            return prepare(item)
        except records.BadRecordError as error:
            return error

    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(attempt, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def apply(
    items: Iterable[T | records.BadRecordError],
    function: Callable[[list[T]], Iterable[Any]],
    size: int,
    *,
    on_error: str = "raise",
) -> Iterator[Any]:
    """Results of a batched function, in the order of the items.

    Args:
      items: as `prepared` yields them.
      function: a batch -> a result for each of it.
      size: of a batch.
      on_error: "raise" errors among the items, or "yield" them in their places.

    Raises:
      ValueError: another `on_error`, or a size below 1.
    """
    if on_error not in ("raise", "yield"):
        raise ValueError(f"on_error={on_error!r} is not 'raise' or 'yield'")
    if size < 1:
        raise ValueError(f"batch_size={size} must be at least 1")
    return _apply(items, function, size, on_error)


def _apply(items, function, size, on_error):
    for batch in batches(items, size):
        good = [item for item in batch if not isinstance(item, records.BadRecordError)]
        bad = [item for item in batch if isinstance(item, records.BadRecordError)]
        if bad and on_error == "raise":
            raise bad[0]
        results = iter(function(good) if good else ())
        for item in batch:
            yield item if isinstance(item, records.BadRecordError) else next(results)
