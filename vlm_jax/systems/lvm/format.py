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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import records
from vlm_jax.program import config as config_lib

# A literal id or those of a field, and the weight of all or of each.
_Part = tuple[int | np.ndarray, float | np.ndarray]

_MAX_ROW = 1 << 24  # tokens; a slip of the keyboard must not allocate terabytes


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
        ids = ("bos_id", "eos_id", "vocab_size")
        config_lib.check_ranges(
            self, max_tokens=(1, _MAX_ROW), **dict.fromkeys(ids, (0, 2**31 - 1))
        )
        self._items  # noqa: B018 - a mistake in `fields` shows before any data are read

    def __call__(self, record: Mapping[str, Any], rng: Any = None) -> dict[str, np.ndarray]:
        """One sentence as one row, padded, or cut at max_tokens. Errors as `encode`."""
        rows, errors = self.format_many([record], 1)
        if errors:
            raise errors[0]
        return {key: x[0] for key, x in rows.items()}

    def format_many(
        self, found: Iterable[Mapping[str, Any] | None], count: int
    ) -> tuple[dict[str, np.ndarray], dict[int, records.BadRecordError]]:
        """A row for each record, and the errors of bad ones by their place; zeros stand for them.

        Args:
          found: `count` records, each needed no longer than until the next; None makes zeros.

        Raises:
          DataError: as `encode`.
        """
        ids = np.zeros((count, self.max_tokens + 1), np.int32)
        weights, sizes = np.zeros(ids.shape, np.float32), np.zeros(count, np.int64)
        errors: dict[int, records.BadRecordError] = {}
        known: dict[Any, Any] = {}
        for row, record in enumerate(found):
            if record is None:
                continue
            try:
                parts = self._parts(record, known)
            except records.BadRecordError as error:
                errors[row] = error
                continue
            sizes[row] = _size(parts)
            if sizes[row] > ids.shape[1]:
                parts = self._cut(parts, ids.shape[1])
            _lay(parts, ids[row], weights[row])
        self._check(ids)
        followed = np.arange(self.max_tokens) < sizes[:, None] - 1  # places with a target
        segments = followed.astype(np.int32)
        return {
            "tokens": ids[:, :-1] * segments,
            "targets": ids[:, 1:].copy(),
            "weights": weights[:, 1:].copy(),
            "segments": segments,
            "positions": np.arange(self.max_tokens, dtype=np.int32) * segments,
        }, errors

    def encode(self, record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """ids int32[n] with BOS and EOS, and the loss weight float32[n] of each.

        Raises:
          BadRecordError: a field is missing, or is neither base64 of whole int32 nor integers.
          DataError: an id is not in [0, vocab_size): another tokenizer, not one bad record.
        """
        return self._joined(self._parts(record, {}))

    def _parts(self, record: Mapping[str, Any], known: dict[Any, Any]) -> list[_Part]:
        """`known`: weights that were checked, by what was given: those of a table are one array."""
        parts: list[_Part] = []
        for item, weight in self._items:
            if isinstance(item, int):
                parts.append((item, weight))
                continue
            ids, factors = _ids(record, item), f"{item}_weights"
            if factors in record:
                given = record[factors]
                key = id(given), weight, len(ids)
                if key not in known:
                    checked = np.float32(weight) * _weights(given, factors, len(ids))
                    known[key] = checked, given
                weight = known[key][0]
            parts.append((ids, weight))
        return parts

    def _joined(self, parts: list[_Part]) -> tuple[np.ndarray, np.ndarray]:
        size = _size(parts)
        ids, weights = np.empty(size, np.int32), np.empty(size, np.float32)
        _lay(parts, ids, weights)
        self._check(ids[None])
        return ids, weights

    def _cut(self, parts: list[_Part], size: int) -> list[_Part]:
        """The first `size` ids; the others are checked here, as nobody sees them later."""
        kept: list[_Part] = []
        for ids, weight in parts:
            room = size - _size(kept)
            if _length(ids) <= room:
                kept.append((ids, weight))
                continue
            if not self._fit(ids if isinstance(ids, int) else ids[room:]):
                self._joined(parts)  # says where
            if room:
                kept.append((ids[:room], weight if isinstance(weight, float) else weight[:room]))
        return kept

    def _fit(self, ids: int | np.ndarray) -> bool:
        if isinstance(ids, int):
            return 0 <= ids < self.vocab_size
        # Negative ids are large ones without their sign.
        return not ids.size or bool(ids.view(np.uint32).max() < self.vocab_size)

    def _check(self, ids_bt: np.ndarray) -> None:
        """Raises DataError for ids outside the vocabulary."""
        if self._fit(ids_bt):
            return
        row, place = np.argwhere((ids_bt < 0) | (ids_bt >= self.vocab_size))[0]
        raise records.DataError(
            f"token id {ids_bt[row, place]} at place {place} is outside [0, {self.vocab_size}); "
            f"was the file made with another codebook? (formatter.vocab_size)"
        )

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


def _length(ids: int | np.ndarray) -> int:
    return 1 if isinstance(ids, int) else len(ids)


def _size(parts: Sequence[_Part]) -> int:
    return sum(_length(ids) for ids, _ in parts)


def _lay(parts: Sequence[_Part], ids: np.ndarray, weights: np.ndarray) -> None:
    """Writes parts one after another from the start of two arrays."""
    start = 0
    for part, weight in parts:
        stop = start + _length(part)
        ids[start:stop], weights[start:stop] = part, weight
        start = stop


def _ids(record: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in record:
        raise records.BadRecordError(f"no field {name!r} among {records.keys_of(record)}")
    value = record[name]
    try:
        if isinstance(value, str):
            value = base64.b64decode(value, validate=True)
        if isinstance(value, bytes):
            return np.frombuffer(value, "<i4").astype(np.int32, copy=False)
        return _whole(value)
    except (binascii.Error, ValueError, OverflowError) as error:
        raise records.BadRecordError(f"field {name!r}: {error}") from error


def _whole(value: Any) -> np.ndarray:
    """int32[n] of integers and nothing else: numpy would cut 1.7 to 1 and take true for 1."""
    if isinstance(value, list | tuple) and set(map(type, value)) <= {int}:
        value = np.array(value, np.int64)
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iu":
        raise ValueError(f"{value!r:.60} is not a list of integers")
    if np.can_cast(value.dtype, np.int32):
        return value.astype(np.int32, copy=False)
    if len(value) and not -(2**31) <= value.min() <= value.max() < 2**31:
        raise ValueError(f"ids {value.min()}..{value.max()} are not of 32 bits")
    return value.astype(np.int32)


def _weights(given: Any, name: str, count: int) -> np.ndarray:
    try:
        found = np.asarray(given)
    except ValueError as error:
        raise records.BadRecordError(f"field {name!r}: {error}") from error
    if found.dtype.kind in "fiub" and found.shape == (count,):
        if found.dtype != np.float32:
            with np.errstate(over="ignore"):
                found = found.astype(np.float32)
        if not count or 0 <= found.min() <= found.max() < np.inf:  # NaN is nowhere
            return found
    raise records.BadRecordError(
        f"field {name!r} is {found.dtype}{list(found.shape)}, not {count} numbers from 0 on"
    )


def to_base64(ids: np.ndarray) -> str:
    """The reference's JSONL form of ids."""
    return base64.b64encode(np.asarray(ids, "<i4").tobytes()).decode()
