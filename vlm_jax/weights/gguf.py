"""GGUF files (llama.cpp): metadata, and tensors dequantised to float32 one at a time, numpy only.

    magic "GGUF" | version | #tensors | #metadata | metadata ... | tensor infos ... | pad | data

Everything is little endian. Shapes are stored innermost first, so they are reversed here and a
linear layer reads (out, in). Blocks of 32 values, as laid out in the ggml project:

    Q4_0  f16 d         | 16 bytes     (nibble - 8) * d
    Q4_1  f16 d | f16 m | 16 bytes     nibble * d + m
    Q8_0  f16 d         | 32 int8      int8 * d

The low nibbles of the 16 bytes are values 0..15 of the block, the high nibbles values 16..31.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.weights import bounds, errors, lazy

_BLOCK = 32
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# ggml type -> (name, bytes of a block, values of a block)
_TYPES = {
    0: ("F32", 4, 1),
    1: ("F16", 2, 1),
    2: ("Q4_0", 18, _BLOCK),
    3: ("Q4_1", 20, _BLOCK),
    8: ("Q8_0", 34, _BLOCK),
    30: ("BF16", 2, 1),
}


def read(path: str | os.PathLike) -> lazy.Tensors:
    """Maps the file and reads its directory; `metadata` holds its key-values.

    Raises:
      WeightsError: not a GGUF file, cut off, damaged, or a tensor type that is not in the table
        above.
    """
    if os.path.getsize(path) < 24:
        raise errors.WeightsError(f"{path}: not a GGUF file: only {os.path.getsize(path)} bytes")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    cursor = _Cursor(data, str(path))
    if cursor.take(4) != b"GGUF":
        raise errors.WeightsError(f"{path}: not a GGUF file: it begins with {bytes(data[:4])!r}")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise errors.WeightsError(f"{path}: GGUF version {version}; versions 2 and 3 are supported")
    num_tensors, num_metadata = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_metadata):
        key = cursor.new_name(metadata)
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos: dict[str, tuple] = {}
    for _ in range(num_tensors):
        name = cursor.new_name(infos)
        sizes = cursor.array("Q", cursor.scalar("I"))[::-1]
        shape = bounds.shape_of(sizes, f"{path}: tensor {name!r}")
        infos[name] = shape, cursor.scalar("I"), cursor.scalar("Q")
    alignment = metadata.get("general.alignment", 32)
    if not bounds.is_count(alignment) or not alignment:
        raise errors.WeightsError(f"{path}: general.alignment is {alignment!r}, not a size")
    start = -(-cursor.offset // alignment) * alignment
    loaders, spans = {}, {}
    for name, (shape, kind, offset) in infos.items():
        raw = _span(data, path, name, start, shape, kind, offset)
        spans[name] = offset, offset + len(raw)
        loaders[name] = _loader(raw, kind, shape)
    bounds.check_apart(spans, str(path))
    return lazy.Tensors(loaders, str(path), metadata)


def _span(data, path, name: str, start: int, shape: tuple, kind: int, offset: int) -> np.ndarray:
    """The raw bytes of a tensor."""
    if kind not in _TYPES:
        known = ", ".join(entry[0] for entry in _TYPES.values())
        raise errors.WeightsError(
            f"{path}: tensor {name!r} has ggml type {kind}; supported: {known}. Requantise "
            "the file to one of these (llama.cpp: llama-quantize)"
        )
    code, block_bytes, block_values = _TYPES[kind]
    if math.prod(shape) % block_values:
        raise errors.WeightsError(
            f"{path}: tensor {name!r} of shape {shape} is not whole blocks of {code}"
        )
    size = math.prod(shape) // block_values * block_bytes
    first = start + offset
    if first + size > len(data):
        raise errors.WeightsError(
            f"{path}: cut off: tensor {name!r} ends at byte {first + size}, the file has "
            f"{len(data)}; fetch it again"
        )
    return data[first : first + size]


def _loader(raw: np.ndarray, kind: int, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: dequantise(raw, _TYPES[kind][0]).reshape(shape)


def dequantise(raw: np.ndarray, kind: str) -> np.ndarray:
    """Raw bytes uint8[N] of a tensor of that type -> its values, float32[...], flat."""
    if kind == "F32":
        return raw.view(np.float32)
    if kind == "F16":
        return raw.view(np.float16).astype(np.float32)
    if kind == "BF16":
        return raw.view(ml_dtypes.bfloat16).astype(np.float32)
    blocks = raw.reshape(-1, {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return (blocks[:, 2:].view(np.int8) * scale).ravel()
    packed = blocks[:, -16:]
    values = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    if kind == "Q4_0":
        return ((values - 8) * scale).ravel()
    minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    return (values * scale + minimum).ravel()


class _Cursor:
    """Sequential reads of the header."""

    def __init__(self, data: np.ndarray, path: str):
        self.offset, self._data, self._path = 0, data, path

    def take(self, size: int) -> bytes:
        if self.offset + size > len(self._data):
            raise errors.WeightsError(
                f"{self._path}: cut off inside the header: needs byte {self.offset + size}, the "
                f"file has {len(self._data)}; fetch it again"
            )
        self.offset += size
        return self._data[self.offset - size : self.offset].tobytes()

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def array(self, code: str, count: int) -> tuple:
        """`count` scalars in one piece: token scores and types have vocabulary length."""
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code)))

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", "replace")

    def new_name(self, known: Mapping[str, Any]) -> str:
        name = self.string()
        if name in known:
            raise errors.WeightsError(f"{self._path}: {name!r} comes twice")
        return name

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise errors.WeightsError(
                f"{self._path}: unknown metadata type {kind} at byte {self.offset}"
            )
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            return list(self.array(_SCALARS[item], count))
        if item != _STRING:
            raise errors.WeightsError(
                f"{self._path}: array of unknown type {item} at byte {self.offset}"
            )
        return [self.string() for _ in range(count)]
