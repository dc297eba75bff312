"""The images of a folder, at any depth; for example the validation images of ImageNet."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib

import numpy as np

from vlm_jax.data import folders, images, records


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Random-access source of {"image_u8", "id"}, in natural order of the names.

    Args:
      path: the folder.
      limit: so many images, drawn with `seed`; 0 takes all.
      seed: of the draw.
    """

    path: str
    limit: int = 0
    seed: int = 0

    def __post_init__(self):
        self._names  # noqa: B018 - a missing folder shows before anything expensive

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> records.Record:
        file = pathlib.Path(os.path.expanduser(self.path), self._names[index])
        return {"image_u8": images.decode(file), "id": self.record_id(index)}

    def record_id(self, index: int) -> str:
        """The name in the folder."""
        return self._names[index]

    @functools.cached_property
    def _names(self) -> list[str]:
        names = folders.list_files(self.path)
        if 0 < self.limit < len(names):
            drawn = np.random.default_rng(self.seed).choice(len(names), self.limit, replace=False)
            names = [names[i] for i in np.sort(drawn)]
        return names


def make_source(**fields) -> ImageFolder:
    """For `type="image_folder"` in a config."""
    return ImageFolder(**fields)
