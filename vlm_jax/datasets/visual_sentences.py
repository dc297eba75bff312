"""Visual sentences on disk: our ArrayRecord files, and the reference's JSONL.

An ArrayRecord record is a msgpack map, read by `type="array_record"`:

    tokens      bytes   little-endian int32 ids, num_images * tokens_per_image, no BOS or EOS
    num_images  int
    id          str     unique, for messages
    source      str     data set or layout it came from
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vlm_jax.data import records, sources


@dataclasses.dataclass(frozen=True)
class Sentence:
    """Tokens of the images of one sentence, in order.

    Attributes:
      tokens: int32[num_images * tokens_per_image].
      num_images: images in it.
      id, source: see the module.
    """

    tokens: np.ndarray
    num_images: int
    id: str
    source: str = ""


def write(path: str | os.PathLike, sentences: Iterable[Sentence]) -> int:
    """Writes an ArrayRecord file (or JSONL when the name ends so); returns the number.

    The file appears under its name only when it is complete.

    Raises:
      DataError: tokens do not divide into the images.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_all = _write_jsonl if path.suffix == ".jsonl" else _write_array_record
        count = write_all(partial, sentences)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def read(path: str | os.PathLike) -> Iterator[Sentence]:
    """The sentences of an ArrayRecord file.

    Raises:
      BadRecordError: a record of another form; names it.
    """
    source = sources.make_source(type="array_record", path=path)
    for index in range(len(source)):
        record = dict(source[index])
        try:
            tokens = np.frombuffer(record.pop("tokens"), "<i4").astype(np.int32)
            yield Sentence(tokens, **record)
        except (KeyError, TypeError, ValueError) as error:
            raise records.BadRecordError(
                f"{source.record_id(index)}: not a visual sentence: {type(error).__name__}: {error}"
            ) from error


def _check(sentence: Sentence) -> np.ndarray:
    tokens = np.asarray(sentence.tokens, "<i4")
    if tokens.ndim != 1 or sentence.num_images < 1 or len(tokens) % sentence.num_images:
        raise records.DataError(
            f"sentence {sentence.id!r}: tokens of shape {tokens.shape} are not "
            f"{sentence.num_images} images"
        )
    return tokens


def _write_array_record(path: pathlib.Path, sentences: Iterable[Sentence]) -> int:
    module = records.require("array_record.python.array_record_module")
    # Groups of 1: any record is read without its neighbours.
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    count = 0
    try:
        for sentence in sentences:
            record: Mapping[str, Any] = {
                "tokens": _check(sentence).tobytes(),
                "num_images": sentence.num_images,
                "id": sentence.id,
                "source": sentence.source,
            }
            writer.write(records.pack(record))
            count += 1
    finally:
        writer.close()
    return count


def _write_jsonl(path: pathlib.Path, sentences: Iterable[Sentence]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for sentence in sentences:
            tokens = base64.b64encode(_check(sentence).tobytes()).decode()
            record = {"tokens": tokens, "id": sentence.id, "source": sentence.source}
            stream.write(json.dumps(record) + "\n")
            count += 1
    return count
