"""Pictures of composed scenes (datasets/composed_scenes.py) for a tokenizer to train on."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from vlm_jax.datasets import composed_scenes


def prepare(
    workdir: pathlib.Path,
    *,
    sentences: Mapping[str, int],
    side: int = 32,
    chunk: int = 64,
    seed: int = 0,
) -> None:
    """Writes WORKDIR/composed/pictures.npy (datasets/picture_table.py), in random order.

    Of the training split; unless it is there from the same arguments.

    Args:
      workdir: of the run.
      sentences: kind -> how many; every sentence is eight pictures.
      side: pixels of a picture.
      chunk: sentences of a device call.
      seed: of everything drawn.

    Raises:
      DataError: unknown kinds, or the photos cannot be had.
    """
    folder = workdir / "composed"
    made_of = dict(sentences=dict(sentences), side=side, chunk=chunk, seed=seed)
    note = folder / "made_of.json"
    if note.exists() and json.loads(note.read_text()) == made_of:
        return
    scenes = composed_scenes.Scenes("train", side=side, chunk=chunk, seed=seed)
    scenes.compile(sentences)
    parts = [part for kind, count in sentences.items() for part in scenes.draw(kind, count)]
    pictures = np.concatenate(parts).reshape(-1, side, side, 3)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".pictures.npy"
    np.save(partial, np.random.default_rng(seed).permutation(pictures))
    os.replace(partial, folder / "pictures.npy")
    note.write_text(json.dumps(made_of))
