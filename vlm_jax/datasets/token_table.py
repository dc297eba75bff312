"""Visual sentences of equal length as one array on disk: `.npy`, uint16 or int32 [sentences, ids].

For sentences that a program makes by the hundred thousand: nothing to parse, read where it lies.
Where a sentence is pairs of question and answer, the questions can weigh less in the loss.
"""

from __future__ import annotations

import functools
import pathlib

import numpy as np

from vlm_jax.data import records, shard_files, sidecar


class TokenTable:
    """Random-access source of {"tokens": int32[ids], "tokens_weights": float32[ids], "id"}.

    The weights are left out where all of them are 1.

    Args:
      path: of the file.
      tokens_per_image: ids of an image.
      question_weight: weight in the loss of the first, third, ... image; the others weigh 1.

    Raises:
      DataError: no such file, or it holds no whole images.
    """

    def __init__(self, path: str, tokens_per_image: int, question_weight: float = 1.0):
        self.path, self._size, self._weight = path, tokens_per_image, question_weight
        if tokens_per_image < 1:
            raise records.DataError(f"tokens_per_image={tokens_per_image} must be at least 1")
        shape, dtype = self._table.shape, self._table.dtype
        if len(shape) != 2 or shape[1] % tokens_per_image or dtype not in (np.uint16, np.int32):
            raise records.DataError(
                f"{path}: {dtype}{list(shape)} is no table of ids with {tokens_per_image} an image"
            )

    def __getstate__(self):
        return {key: x for key, x in self.__dict__.items() if key != "_table"}  # mapped again there

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> records.Record:
        return self._record(index, self._table[index].astype(np.int32))

    def read_many(self, indices: np.ndarray) -> list[records.Record]:
        """Records that share one array."""
        return [
            self._record(index, ids)
            for index, ids in zip(indices.tolist(), self._table[indices].astype(np.int32))
        ]

    def _record(self, index: int, ids: np.ndarray) -> records.Record:
        record = {"tokens": ids, "id": self.record_id(index)}
        return record if self._weight == 1 else {**record, "tokens_weights": self._weights}

    def record_id(self, index: int) -> str:
        """File and row."""
        return f"{self.path}:{index}"

    def fingerprint(self):
        """Path, size and time of change."""
        return sidecar.fingerprint([pathlib.Path(self.path)])

    @functools.cached_property
    def _table(self) -> np.ndarray:
        return shard_files.map_array(self.path)

    @functools.cached_property
    def _weights(self) -> np.ndarray:
        images = np.ones(self._table.shape[1] // self._size, np.float32)
        images[::2] = self._weight
        return np.repeat(images, self._size)


def make_source(**fields) -> TokenTable:
    """For `type="token_table"` in a config."""
    return TokenTable(**fields)
