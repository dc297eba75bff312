"""Token files decoded back to a picture; ours and upstream's."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from vlm_jax.data import images, records, sources
from vlm_jax.encoders import image_tokenizer
from vlm_jax.systems.lvm import format as lvm_format

_COLUMNS = 16  # images in a line; longer sentences go on below


def write(
    path: str | os.PathLike,
    token_files: Sequence[str],
    tokenizer: image_tokenizer.ImageTokenizer,
    rows: int = 8,
) -> int:
    """Draws sentences, evenly spaced over the files, a line each; returns how many.

    Raises:
      DataError: no sentence, or ids that are not whole images of this tokenizer.
    """
    type = "jsonl" if str(token_files[0]).endswith(".jsonl") else "array_record"
    source = sources.make_source(type=type, path=[str(file) for file in token_files])
    if not len(source):
        raise records.DataError(f"{token_files[0]}: no sentence in it")
    size, codes = tokenizer.cfg.tokens_per_image, tokenizer.cfg.num_embeddings
    read = lvm_format.Formatter(fields="{tokens}", vocab_size=codes)
    lines = []
    chosen = np.unique(np.linspace(0, len(source) - 1, rows).round().astype(int))
    for index in chosen.tolist():
        try:
            ids, _ = read.encode(source[index])
        except records.DataError as error:
            raise records.DataError(f"{source.record_id(index)}: {error}") from error
        if len(ids) % size or not len(ids):
            raise records.DataError(
                f"{source.record_id(index)}: {len(ids)} ids are not whole images of {size}; was "
                f"the file made with another tokenizer or another --side?"
            )
        pictures = list(tokenizer.decode_u8(ids.reshape(-1, size)))
        lines += [pictures[at : at + _COLUMNS] for at in range(0, len(pictures), _COLUMNS)]
    sheet = images.draw_grid(lines, cell=tokenizer.side)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_bytes(images.encode(sheet))
    return len(chosen)
