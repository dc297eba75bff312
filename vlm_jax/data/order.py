"""Which record stands where: weighted mixtures and shuffles as pure functions of the position.

Nothing here has a state and no order is written down, so any position of any epoch is found
directly, on any host, and no library's version can change the order of a run that resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping

import numpy as np

# Positions after which the pattern of a mixture repeats; the first that meets all shares is taken.
_PATTERNS = (1000, 10_000, 100_000, 1_000_000, 10_000_000)
_SMALLEST_SHARE = 1e-6
_TOLERANCE = 0.01  # of a share, where no pattern meets it exactly
# Places of a shuffle that are found at once.
_BLOCK = 4096


def _mix(x: np.ndarray) -> np.ndarray:
    """64-bit finaliser of splitmix64: every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, length: int, key: int) -> np.ndarray:
    """The `key`-th pseudo-random permutation of 0 ... length-1, at any places.

    A four-round Feistel network over the next even power of two; results beyond the length are
    sent through again until they fall inside (fewer than four passes on average).

    Args:
      index: int64[...], all in [0, length).
      length: of the permuted range. key: any non-negative int.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(zlib.crc32(f"{key}/{turn}".encode()) * 0x9E3779B1) for turn in range(4)]
    result = np.array(index, np.uint64)
    todo = np.ones(result.shape, bool)
    while todo.any():
        x = result[todo]
        left, right = x >> half, x & low
        for turn_key in keys:
            left, right = right, left ^ (_mix(right + turn_key) & low)
        result[todo] = (left << half) | right
        todo[todo] = result[todo] >= length
    return result.astype(np.int64)


def _permute(index: np.ndarray, length: int, key: int) -> np.ndarray:
    """`permute` of places near each other, as batches ask for them: far faster block by block."""
    if index.size > _BLOCK:
        return permute(index, length, key)
    block, place = np.divmod(index, _BLOCK)
    result = np.empty_like(index)
    for each in np.unique(block).tolist():
        here = block == each
        result[here] = _block(each, length, key)[place[here]]
    return result


@functools.lru_cache(maxsize=64)
def _block(number: int, length: int, key: int) -> np.ndarray:
    start = number * _BLOCK
    return permute(np.arange(start, min(start + _BLOCK, length)), length, key)


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """The endless order of one source: a fresh permutation per epoch, or file order.

    Args:
      length: of the source. seed: of the run. name: of the source in the mixture.
      enabled: False keeps file order and wraps around.
    """

    length: int
    seed: int
    name: str
    enabled: bool = True

    def locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and record index at these positions, which may span epochs."""
        epoch, index = np.divmod(np.asarray(position, np.int64), self.length)
        if self.enabled:
            for each in np.unique(epoch):
                here = epoch == each
                index[here] = _permute(index[here], self.length, self._key(int(each)))
        return epoch, index

    def of_epoch(self, epoch: int) -> np.ndarray:
        """All record indices of one epoch in order, int64[length]."""
        return self.locate(np.arange(self.length) + epoch * self.length)[1]

    def _key(self, epoch: int) -> int:
        return zlib.crc32(f"{self.seed}/{self.name}/{epoch}".encode())


def _counts(shares: np.ndarray) -> np.ndarray:
    """Places of every source in the shortest pattern that meets the shares."""
    if len(shares) == 1:
        return np.array([1])
    for length in _PATTERNS:
        counts = np.maximum(1, np.rint(length * shares)).astype(np.int64)
        if np.all(np.abs(counts - length * shares) <= _TOLERANCE * length * shares):
            return counts
    return counts  # a share near a millionth, met within a twentieth


class Mixture:
    """Deals endless positions to sources in fixed proportions, evenly spread.

    With weights {a: 3, b: 1} the pattern is a a b a, a a b a, ... Shares are met within a hundredth
    of themselves, down to a millionth of the whole.

    Args:
      weights: name -> positive weight; the order of the names does not matter.

    Raises:
      ValueError: a share below a millionth.
    """

    def __init__(self, weights: Mapping[str, float]):
        self.names = sorted(weights)
        total = sum(weights.values())
        shares = np.array([weights[name] / total for name in self.names])
        if shares.min() < _SMALLEST_SHARE * (1 - 1e-9):
            raise ValueError(
                f"{self.names[int(shares.argmin())]!r} has a share of {shares.min():.2g} of the "
                f"mixture, below {_SMALLEST_SHARE}: raise its weight or leave it out"
            )
        counts = _counts(shares)
        self._counts = counts // np.gcd.reduce(counts)
        # The j-th of n takes the place (j + 1/2) / n of the pattern.
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in self._counts])
        owner = np.repeat(np.arange(len(self._counts)), self._counts)
        rank = np.concatenate([np.arange(n) for n in self._counts])
        by_place = np.argsort(places, kind="stable")
        self._owner, self._rank = owner[by_place], rank[by_place]

    def deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sources at these positions, as places in `names`, and how many each had before."""
        turn, place = np.divmod(np.asarray(positions, np.int64), len(self._owner))
        owner = self._owner[place]
        return owner, turn * self._counts[owner] + self._rank[place]

    def locate(self, position: int) -> tuple[str, int]:
        """`deal` of one position, with the name of the source."""
        owner, number = self.deal(np.array(position))
        return self.names[int(owner)], int(number)
