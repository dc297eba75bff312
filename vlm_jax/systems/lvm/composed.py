"""Token files of composed scenes (datasets/composed_scenes.py), drawn and tokenized in one go.

Half a million sentences take minutes on a GPU. Writes WORKDIR/composed/KIND.npy, see
datasets/token_table.py.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.datasets import composed_scenes
from vlm_jax.encoders import image_tokenizer
from vlm_jax.models import vqgan


def prepare(
    workdir: pathlib.Path,
    *,
    sentences: Mapping[str, int],
    tokenizer: str = "tiny",
    image_side: int = 32,
    chunk: int = 64,
    seed: int = 0,
) -> None:
    """Writes the token files of the training split, unless they are there from the same arguments.

    Args:
      workdir: of the run.
      sentences: kind -> how many.
      tokenizer: "tiny" or a folder.
      image_side: pixels of an image.
      chunk: sentences of a device call.
      seed: of everything drawn.

    Raises:
      DataError: unknown kinds, or the photos cannot be had.
    """
    folder = workdir / "composed"
    made_of = dict(
        sentences=dict(sentences),
        tokenizer=tokenizer,
        image_side=image_side,
        chunk=chunk,
        seed=seed,
    )
    note = folder / "made_of.json"
    if note.exists() and json.loads(note.read_text()) == made_of:
        return
    start = time.monotonic()
    encoder = image_tokenizer.ImageTokenizer.load(tokenizer, side=image_side)
    network = vqgan.make(encoder.cfg)

    @jax.jit
    def to_ids(params, images_u8):
        image01 = images_u8.reshape(-1, *images_u8.shape[2:]) / jnp.float32(255)
        ids = network.bind(params).encode(image01)
        return ids.reshape(len(images_u8), -1).astype(jnp.uint16)

    tokenize = functools.partial(to_ids, jax.device_put(encoder.params))
    scenes = composed_scenes.Scenes("train", side=image_side, chunk=chunk, seed=seed)
    scenes.compile(sentences)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, count in sentences.items():
        table = np.concatenate(list(scenes.draw(kind, count, tokenize)))
        partial = folder / f".{kind}.npy"
        np.save(partial, table)
        os.replace(partial, folder / f"{kind}.npy")
    note.write_text(json.dumps(made_of))
    print(
        f"[lvm] drew and tokenized {sum(sentences.values())} sentences of composed scenes in "
        f"{time.monotonic() - start:.0f} s, into {folder}",
        file=sys.stderr,
    )
