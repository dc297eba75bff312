"""Pictures of equal size as one array on disk: `.npy`, uint8 [pictures, height, width, 3]."""

from __future__ import annotations

import functools

import numpy as np

from vlm_jax.data import records, shard_files


class PictureTable:
    """Random-access source of {"image_u8", "id"}.

    Args:
      path: of the file.

    Raises:
      DataError: no such file, or it holds no pictures.
    """

    def __init__(self, path: str):
        self.path = path
        shape, dtype = self._table.shape, self._table.dtype
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise records.DataError(f"{path}: {dtype}{list(shape)} is not uint8[N, H, W, 3]")

    def __getstate__(self):
        return {"path": self.path}  # mapped again there

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> records.Record:
        return {"image_u8": np.array(self._table[index]), "id": self.record_id(index)}

    def record_id(self, index: int) -> str:
        """File and number."""
        return f"{self.path}:{index}"

    @functools.cached_property
    def _table(self) -> np.ndarray:
        return shard_files.map_array(self.path)


def make_source(**fields) -> PictureTable:
    """For `type="picture_table"` in a config."""
    return PictureTable(**fields)
