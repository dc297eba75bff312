"""Documents into rows of a fixed number of tokens, planned from the documents' lengths alone.

Rows are endless and any row is found directly: a run resumes, and a host takes its own rows,
without reading what stands before.

"stream", the reference's packing (upstream: EasyLM/data.py): documents are laid end to end in epoch
after epoch, and row r holds the ids [rT, rT+T) with the ids [rT+1, rT+T] as targets. Sentences
straddle rows; attention is not blocked at their borders. With T = 4 and the documents abc, de,
fghij:

    tokens    a b c d   e f g h   i j a b        segments  1 1 1 1 ...
    targets   b c d e   f g h i   j a b c        positions 0 1 2 3 ...

"documents": whole documents, first fit over a bounded window of open rows; longer ones are cut.
The last id of a piece is only a target, so T = the usual length - 1 cuts nothing, and a T just
below that leaves rests of a few tokens. With T = 4:

    tokens    a b d .   f g h i                  segments  1 1 2 0   1 1 1 1
    targets   b c e .   g h i j                  positions 0 1 0 0   0 1 2 3
"""

from __future__ import annotations

import bisect
import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import order, records

# Rows kept open for first fit. Bounds the work per document and how far a document may move.
WINDOW = 64


Row = dict[str, np.ndarray]


class Piece(NamedTuple):
    """Ids [start, stop) of one document, put at place `slot` of a row."""

    epoch: int
    index: int  # type: ignore[assignment]  # of the record in its source; hides tuple.index
    start: int
    stop: int
    slot: int


class Document(NamedTuple):
    """Token ids and, for each, the weight of its prediction. None: unreadable, see `error`."""

    ids: np.ndarray | None
    weights: np.ndarray | None
    error: str = ""


class StreamPlan:
    """Row -> pieces, for "stream".

    Args (and attribute `lengths`):
      lengths: int[N], ids per record, 0 for unusable ones.
      shuffle: the endless order of the records.
      row_tokens: T.
    """

    def __init__(self, lengths: np.ndarray, shuffle: order.Shuffle, row_tokens: int):
        self.lengths, self._shuffle, self._row_tokens = lengths, shuffle, row_tokens
        self._positions = np.arange(row_tokens, dtype=np.int32)
        self._total = int(lengths.sum())
        if self._total < 2:
            raise records.DataError(f"{shuffle.name!r}: {self._total} tokens cannot be trained on")
        self._epochs = _Latest(self._plan_epoch)

    @property
    def rows_per_pass(self) -> int:
        """Rows that hold a target of one pass over the records."""
        return -(-(self._total - 1) // self._row_tokens)

    def pieces(self, row: int, *, one_pass: bool = False) -> list[Piece]:
        """What fills the T + 1 ids of a row: T inputs, and the target of the last."""
        begin = row * self._row_tokens
        end = begin + self._row_tokens + 1
        end = min(end, self._total) if one_pass else end
        pieces, offset = [], begin
        while offset < end:
            epoch, local = divmod(offset, self._total)
            indices, starts = self._epochs(epoch)
            # The last document that starts here; those of length 0 before it are passed over.
            place = int(np.searchsorted(starts, local, side="right")) - 1
            first = local - int(starts[place])
            size = min(int(starts[place + 1]) - local, end - offset)
            piece = Piece(epoch, int(indices[place]), first, first + size, offset - begin)
            pieces.append(piece)
            offset += size
        return pieces

    def fill(
        self, pieces: Iterable[Piece], load: Callable[[Piece], Document], row: Row | None = None
    ) -> Row:
        """The arrays of a row, see `blank_rows`; `row`, blank ones, are filled and returned."""
        row = blank_row(self._row_tokens) if row is None else row
        ids = np.zeros(self._row_tokens + 1, np.int32)
        weights = np.zeros(self._row_tokens + 1, np.float32)
        filled = 0
        for piece in pieces:
            document, place = load(piece), slice(piece.slot, piece.slot + piece.stop - piece.start)
            filled = place.stop
            if document.ids is not None and document.weights is not None:
                ids[place] = document.ids[piece.start : piece.stop]
                weights[place] = document.weights[piece.start : piece.stop]
        row["tokens"][:], row["targets"][:], row["weights"][:] = ids[:-1], ids[1:], weights[1:]
        row["segments"][:filled] = 1
        row["positions"][:] = self._positions
        return row

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        indices = self._shuffle.of_epoch(epoch)
        return indices, np.concatenate([[0], np.cumsum(self.lengths[indices], dtype=np.int64)])


class DocumentPlan:
    """Row -> pieces, for "documents". Arguments as `StreamPlan`.

    The number of rows of an epoch depends on its order, so the first row of epoch e needs the
    plans (not the data) of the epochs before: about a second per million documents and epoch.
    """

    def __init__(self, lengths: np.ndarray, shuffle: order.Shuffle, row_tokens: int):
        self.lengths, self._shuffle, self._row_tokens = lengths, shuffle, row_tokens
        self._positions = np.arange(row_tokens, dtype=np.int32)
        if not (lengths > 1).any():
            raise records.DataError(
                f"{shuffle.name!r}: none of {len(lengths)} documents has 2 tokens to learn from"
            )
        self._epochs = _Latest(self._plan_epoch)
        self._ends: list[int] = []  # row after the last one of each epoch planned so far
        self._lock = threading.Lock()

    def __reduce__(self):
        return DocumentPlan, (self.lengths, self._shuffle, self._row_tokens)

    @property
    def rows_per_pass(self) -> int:
        """Rows of the first epoch."""
        return self._count(0)

    def pieces(self, row: int, *, one_pass: bool = False) -> list[Piece]:
        """The documents of a row, in the order of their places."""
        with self._lock:
            while not self._ends or self._ends[-1] <= row:
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + self._count(len(self._ends)))
        epoch = bisect.bisect_right(self._ends, row)
        table, bounds = self._epochs(epoch)
        row -= self._ends[epoch - 1] if epoch else 0
        found = table[bounds[row] : bounds[row + 1]].tolist()
        return [Piece(epoch, *numbers) for numbers in found]

    def _count(self, epoch: int) -> int:
        return len(self._epochs(epoch)[1]) - 1

    def fill(
        self, pieces: Iterable[Piece], load: Callable[[Piece], Document], row: Row | None = None
    ) -> Row:
        """As `StreamPlan.fill`."""
        row = blank_row(self._row_tokens) if row is None else row
        for segment, piece in enumerate(pieces, 1):
            document, size = load(piece), piece.stop - piece.start - 1
            place = slice(piece.slot, piece.slot + size)
            if document.ids is None or document.weights is None:
                continue
            ids, weights = document.ids[piece.start : piece.stop], document.weights
            row["tokens"][place], row["targets"][place] = ids[:-1], ids[1:]
            row["weights"][place] = weights[piece.start + 1 : piece.stop]
            row["segments"][place], row["positions"][place] = segment, self._positions[:size]
        return row

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """int64[pieces, (index, start, stop, slot)] sorted by row, and the bounds of each row."""
        indices = self._shuffle.of_epoch(epoch)
        placed, num_rows = [], 0
        space: dict[int, int] = {}  # of the open rows, oldest first
        for index, length in zip(indices.tolist(), self.lengths[indices].tolist()):
            for start in range(0, length - 1, self._row_tokens):
                size = min(self._row_tokens, length - 1 - start)
                row = next((row for row, free in space.items() if free >= size), num_rows)
                if row == num_rows:
                    num_rows += 1
                    space[row] = self._row_tokens
                slot = self._row_tokens - space[row]
                placed.append((row, index, start, start + size + 1, slot))
                space[row] -= size
                if not space[row]:
                    del space[row]
                elif len(space) > WINDOW:
                    del space[next(iter(space))]
        table = np.array(placed, np.int64)
        table = table[np.argsort(table[:, 0], kind="stable")]
        return table[:, 1:], np.searchsorted(table[:, 0], np.arange(num_rows + 1))


PLANS: dict[str, type[StreamPlan | DocumentPlan]] = {
    "stream": StreamPlan,
    "documents": DocumentPlan,
}


def blank_rows(count: int, row_tokens: int) -> Row:
    """Rows without documents.

    key        dtype[shape]   meaning
    tokens     int32[N, T]    inputs
    targets    int32[N, T]    the id that follows each input
    weights    float32[N, T]  of each target in the loss; 0 is no loss
    segments   int32[N, T]    0 is padding, documents count from 1; all 1 in stream mode
    positions  int32[N, T]    from 0 in each row (stream) or segment (documents)
    """
    row = {
        key: np.zeros((count, row_tokens), np.int32)
        for key in ("tokens", "targets", "segments", "positions")
    }
    return row | {"weights": np.zeros((count, row_tokens), np.float32)}


def blank_row(row_tokens: int) -> Row:
    """One of `blank_rows`, without the axis of rows."""
    return {key: rows[0] for key, rows in blank_rows(1, row_tokens).items()}


class _Latest:
    """The last few results of a slow function; thread-safe; pickled without them."""

    def __init__(self, compute: Callable[[int], Any]):
        self._compute = compute
        self._cached = functools.lru_cache(maxsize=3)(compute)
        self._lock = threading.Lock()

    def __call__(self, epoch: int) -> Any:
        with self._lock:  # so that threads wait for one plan instead of making many
            return self._cached(epoch)

    def __reduce__(self):
        return _Latest, (self._compute,)
