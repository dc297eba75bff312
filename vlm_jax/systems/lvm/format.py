"""Visual sentences: records of token ids in, rows for the language model out. Numpy only.

    key        dtype[shape]     meaning
    tokens     int32[B, T]      inputs
    targets    int32[B, T]      the id that follows each input
    weights    float32[B, T]    of each target in the loss; 0 is no loss
    segments   int32[B, T]      0 is padding, sentences count from 1; all 1 in stream mode
    positions  int32[B, T]      from 0 in each row (stream) or sentence (documents)

A record is {"tokens": ids, ...}: base64 text of little-endian int32 (the reference's JSONL), or
those bytes themselves (our ArrayRecord, see datasets/visual_sentences.py). Its ids are whole
images in raster order, without BOS and EOS. `tokens_weights`, float32 per id, where a record has
them, are factors of the weights.

How images become sentences: `layouts.py`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.data import packing, records


@dataclasses.dataclass(frozen=True)
class Formatter:
    """Record -> ids and weights, by the reference's field language (upstream: EasyLM/data.py).

    Attributes:
      max_tokens: T, tokens of a row.
      fields: comma-separated: `{name}` the ids of that field, `<|123|>` an id, `<|bos|>`,
        `<|eos|>`; in square brackets without loss. The published `,{tokens},` lost its angle
        brackets; this default is its working form.
      bos_id, eos_id: the two ids after the codebook.
      vocab_size: ids must be below.
    """

    max_tokens: int = 4096  # upstream: 16 images of 256 tokens
    fields: str = "<|bos|>,{tokens},<|eos|>"
    bos_id: int = 8192  # upstream: codebook of 8192, then 100 special ids
    eos_id: int = 8193
    vocab_size: int = 8292

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"formatter.max_tokens={self.max_tokens} must be positive")
        self._items  # noqa: B018 - a mistake in `fields` shows before any data are read

    def __call__(self, record: Mapping[str, Any], rng: Any = None) -> dict[str, np.ndarray]:
        """One sentence as one row, padded, or cut at max_tokens."""
        ids, weights = self.encode(record)
        ids, weights = ids[: self.max_tokens + 1], weights[: self.max_tokens + 1]
        size = len(ids) - 1
        row = packing.blank_row(self.max_tokens)
        row["tokens"][:size], row["targets"][:size] = ids[:-1], ids[1:]
        row["weights"][:size], row["segments"][:size] = weights[1:], 1
        row["positions"][:size] = np.arange(size)
        return row

    def encode(self, record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """ids int32[n] with BOS and EOS, and the loss weight float32[n] of each.

        Raises:
          BadRecordError: a field is missing, or is neither base64 of whole int32 nor integers.
          DataError: an id is not in [0, vocab_size): another tokenizer, not one bad record.
        """
        parts, weights = [], []
        for item, weight in self._items:
            ids = np.array([item], np.int32) if isinstance(item, int) else _ids(record, item)
            parts.append(ids)
            weights.append(np.full(len(ids), weight, np.float32))
            if f"{item}_weights" in record:
                weights[-1] *= _weights(record, f"{item}_weights", len(ids))
        ids = np.concatenate(parts)
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            place = int(outside.argmax())
            raise records.DataError(
                f"token id {ids[place]} at place {place} is outside [0, {self.vocab_size}); was "
                f"the file made with another codebook? (formatter.vocab_size)"
            )
        return ids, np.concatenate(weights)

    @property
    def num_literals(self) -> int:
        """Ids of every record that come from `fields`, not from the record."""
        return sum(isinstance(item, int) for item, _ in self._items)

    @functools.cached_property
    def _items(self) -> list[tuple[int | str, float]]:
        return [self._parse(item) for item in self.fields.split(",")]

    def _parse(self, item: str) -> tuple[int | str, float]:
        """("tokens", 1.0) for a field, (id, 1.0) for a literal; weight 0 in brackets."""
        inner, weight = item, 1.0
        if item.startswith("[") and item.endswith("]"):
            inner, weight = item[1:-1], 0.0
        if name := re.fullmatch(r"\{(\w+)\}", inner):
            return name[1], weight
        if literal := re.fullmatch(r"<\|(\d+|bos|eos)\|>", inner):
            named = {"bos": self.bos_id, "eos": self.eos_id}
            return int(named.get(literal[1], literal[1])), weight
        raise ValueError(
            f"formatter.fields={self.fields!r}: {item!r} is not {{name}}, <|id|>, <|bos|> or "
            f"<|eos|> (in square brackets for no loss); there is no text tokenizer here"
        )


make_formatter = Formatter


def _ids(record: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in record:
        raise records.BadRecordError(f"no field {name!r} among {records.keys_of(record)}")
    value = record[name]
    try:
        if isinstance(value, str):
            value = base64.b64decode(value, validate=True)
        if isinstance(value, bytes):
            return np.frombuffer(value, "<i4").astype(np.int32)
        return _whole(value)
    except (binascii.Error, ValueError, OverflowError) as error:
        raise records.BadRecordError(f"field {name!r}: {error}") from error


def _whole(value: Any) -> np.ndarray:
    """int32[n] of integers and nothing else: numpy would cut 1.7 to 1 and take true for 1."""
    if isinstance(value, list | tuple) and set(map(type, value)) <= {int}:
        value = np.array(value, np.int64)
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iu":
        raise ValueError(f"{value!r:.60} is not a list of integers")
    if len(value) and not -(2**31) <= value.min() <= value.max() < 2**31:
        raise ValueError(f"ids {value.min()}..{value.max()} are not of 32 bits")
    return value.astype(np.int32)


def _weights(record: Mapping[str, Any], name: str, count: int) -> np.ndarray:
    try:
        found = np.asarray(record[name])
    except ValueError as error:
        raise records.BadRecordError(f"field {name!r}: {error}") from error
    if found.dtype.kind in "fiub" and found.shape == (count,):
        with np.errstate(over="ignore"):
            weights = found.astype(np.float32)
        if ((weights >= 0) & (weights < np.inf)).all():
            return weights
    raise records.BadRecordError(
        f"field {name!r} is {found.dtype}{list(found.shape)}, not {count} numbers from 0 on"
    )


def to_base64(ids: np.ndarray) -> str:
    """The reference's JSONL form of ids."""
    return base64.b64encode(np.asarray(ids, "<i4").tobytes()).decode()
