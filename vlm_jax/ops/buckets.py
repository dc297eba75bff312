"""Host arrays in pieces of few lengths, so that few shapes are compiled. Numpy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def length(count: int, most: int, unit: int = 1) -> int:
    """The power of two, times `unit`, that holds `count` rows; at most `most`."""
    return min(most, unit << max(-(-count // unit) - 1, 0).bit_length())


def pieces(most: int, *arrays: np.ndarray) -> Iterator[tuple[int, int, list[np.ndarray]]]:
    """Consecutive rows of arrays of equal length: (first row, number of rows, filled rows).

    Every piece has `most` rows, the last one `length` of what is left; behind its own rows stand
    copies of the last, which the caller drops from the result.
    """
    for start in range(0, len(arrays[0]), most):
        parts = [np.asarray(x[start : start + most]) for x in arrays]
        count = len(parts[0])
        fill = length(count, most) - count
        yield start, count, [np.concatenate([x, np.repeat(x[-1:], fill, axis=0)]) for x in parts]
