"""One pass of an evaluation: what an evaluator is given, and how processes add up what they found.

Every process reads, predicts and scores rows of its own. `gather` brings the lines of all together
in the order of the data, `add` sums arrays, so that every process has the numbers of the whole
pass, the same as one process would have.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax import answer


@dataclasses.dataclass
class Batch:
    """Rows of a batch that this process scores.

    Attributes:
      arrays: key -> [rows, ...], what the predictors read.
      hosts: per row.
      valid: bool[rows], False where a row only fills the batch, where its record could not be read,
        or where another process scores it.
      rows: int64[rows], the number of each in the pass.
    """

    arrays: Mapping[str, np.ndarray]
    hosts: list[answer.Host]
    valid: np.ndarray
    rows: np.ndarray

    def scored(self) -> list[int]:
        """The places of the valid rows."""
        return np.flatnonzero(self.valid).tolist()


@dataclasses.dataclass
class Pass:
    """What `Evaluator.run` is given.

    Attributes:
      batches: of one pass over the data of the evaluation.
      predict: batch -> numpy arrays of its rows, from the predictor that the evaluator names.
      read: (outputs, batch) -> an Answer per row, by the formatter.
      other: fields of a `DataConfig` -> batches with all rows of other data, for baselines.
      folder: of the results, there on every process.
      first: whether this process writes what there is one of; files of a row are written by the
        process that scores it.
    """

    batches: Iterator[Batch]
    predict: Callable[[Batch], dict[str, np.ndarray]]
    read: Callable[[Mapping[str, np.ndarray], Batch], list[answer.Answer]]
    other: Callable[[Mapping[str, Any]], Iterator[Batch]]
    folder: pathlib.Path
    first: bool = True

    def answers(self, batch: Batch) -> list[answer.Answer]:
        """What the model says of every row."""
        return self.read(self.predict(batch), batch)

    def gather(self, lines: Iterable[tuple[int, Any]]) -> list[Any]:
        """What JSON can write of every scored row of all processes, in the order of the data.

        Args:
          lines: (number of the row, its line).
        """
        return gather(lines)

    def parts(self, array: np.ndarray) -> list[np.ndarray]:
        """A float64[N] of every process, each of its own length."""
        return parts(array)

    def add(self, sums: Any) -> Any:
        """A tree of arrays of equal shapes everywhere, summed over the processes, in float64."""
        return add(sums)


def gather(lines: Iterable[tuple[int, Any]]) -> list[Any]:
    """See `Pass.gather`. Collective."""
    own = list(lines)
    if jax.process_count() > 1:
        texts = _exchange(json.dumps(own).encode())
        own = [line for text in texts for line in json.loads(text)]
    return [line for _, line in sorted(own, key=lambda pair: pair[0])]


def parts(array: np.ndarray) -> list[np.ndarray]:
    """See `Pass.parts`. Collective."""
    if jax.process_count() == 1:
        return [array]
    # As bytes: JAX would round float64 to float32 on the way.
    contents = _exchange(np.asarray(array, np.float64).tobytes())
    return [np.frombuffer(content, np.float64) for content in contents]


def add(sums: Any) -> Any:
    """See `Pass.add`. Collective."""
    if jax.process_count() == 1:
        return sums
    return jax.tree.map(lambda x: np.sum(parts(np.ravel(x)), axis=0).reshape(np.shape(x)), sums)


def _exchange(content: bytes) -> list[bytes]:
    """What every process gives, in their order."""
    own = np.frombuffer(content, np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(own)))).tolist()
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(own)] = own
    found = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(found, lengths, strict=True)]
