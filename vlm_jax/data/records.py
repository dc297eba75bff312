"""What a data set yields, and the errors of the data floor.

A record is a plain dict of JSON-like values, bytes and numpy arrays. The keys have one meaning
everywhere, units in the names:

    key       type                 meaning
    image_u8  uint8[H, W, 3]       RGB, any size
    frames_u8 uint8[N, H, W, 3]    frames of one shot, in time order
    id        str                  names the record in messages; unique in its data set
    label     int                  class index, -1 when there is none
    name      str                  class or photo name for people
    labels    list[str]            what is in the picture, ready to use
    captions  list[str]            sentences about the picture; `caption` or `txt` (str) is one
    split     str                  "train" or "heldout"
"""

from __future__ import annotations

import importlib
import json
import types
from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]

# How text files are written. File names need not be UTF-8: their odd bytes are lone surrogates in
# Python, which become the escapes that JSON has for them.
TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}


UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how files of it, and of UTF-32, begin


class DataError(ValueError):
    """Input that cannot be used; the message names the file or record, the cause, the remedy."""


class BadRecordError(DataError):
    """One record cannot be read or formatted; the pipeline counts it and goes on.

    Any other `DataError` stops the run: it means that the data do not fit the configuration.
    """


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def require(module: str, extra: str = "data") -> types.ModuleType:
    """Imports an optional module, or says which extra installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f'{module!r} is not installed; it comes with: pip install "vlm_jax[{extra}]"'
        ) from error


def parse_json(content: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
      BadRecordError: not JSON, not UTF-8, a key twice, numbers or nesting beyond what Python reads.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"{type(error).__name__}: {error}") from error


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.40} comes twice in one object")
    return found


def keys_of(record: Mapping[Any, Any]) -> list[str]:
    """The keys for a message: a few of them, in order, none of them long."""
    keys = sorted(f"{key!s:.40}" for key in record)
    return keys[:12] + ([f"and {len(keys) - 12} more"] if len(keys) > 12 else [])


def pack(record: Record) -> bytes:
    """The record as msgpack; arrays must have been turned into bytes."""
    import msgpack

    return msgpack.packb(record, use_bin_type=True)


def unpack(content: bytes) -> Record:
    """The record of `pack`.

    Raises:
      BadRecordError: the bytes are not a msgpack map.
    """
    import msgpack

    try:
        record = msgpack.unpackb(content, raw=False, object_pairs_hook=_unique)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BadRecordError(f"not a msgpack record: {type(error).__name__}: {error}") from error
    if not isinstance(record, dict):
        raise BadRecordError(f"a msgpack {type(record).__name__} where a map was expected")
    return record
