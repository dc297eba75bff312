"""msgpack checkpoints of flax and EasyLM.

A stream is a bare sequence of pairs (path as a list of strings, bytes of one flax leaf); a nested
file is one map, as flax's `to_bytes` writes it. One pass notes where each leaf lies; leaves are
unpacked from the mapped file when asked for.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.weights import bounds, errors, lazy

_MAX_DEPTH = 64  # names in a path
_MAX_BYTES = 2**32 - 1  # msgpack's own
_DTYPES = {
    np.dtype(dtype).name: np.dtype(dtype)
    for dtype in (
        ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
        np.float16, np.float32, np.float64, np.bool_, np.int8, np.int16, np.int32, np.int64,
        np.uint8, np.uint16, np.uint32, np.uint64,
    )
}  # fmt: skip


def read_stream(file: pathlib.Path, below: str = "") -> lazy.Tensors:
    """EasyLM's stream; only what lies below that path, without it.

    Raises:
      WeightsError: cut off, damaged, not a stream, or nothing below.
    """

    def entries(unpacker):
        size = file.stat().st_size
        while unpacker.tell() < size:
            if unpacker.read_array_header() != 2:
                raise ValueError("an item is not a pair (path, bytes)")
            depth = unpacker.read_array_header()
            if depth > _MAX_DEPTH:
                raise ValueError(f"a path of {depth} names")
            yield _name(unpacker.unpack() for _ in range(depth))

    spans = _spans(file, entries)
    data = np.memmap(file, dtype=np.uint8, mode="r")
    loaders = {
        name[len(below) :]: functools.partial(_stream_leaf, data[begin:end])
        for name, (begin, end) in spans.items()
        if name.startswith(below)
    }
    if not loaders:
        raise errors.WeightsError(
            f"{file}: no path begins with {below!r}; paths: {list(spans)[:5]} ..."
        )
    return lazy.Tensors(loaders, str(file))


def read_nested(file: pathlib.Path) -> lazy.Tensors:
    """The whole tree in one msgpack map.

    Raises:
      WeightsError: cut off, damaged, not a map, or bytes behind it.
    """
    data = np.memmap(file, dtype=np.uint8, mode="r")

    def entries(unpacker):
        def walk(prefix):
            if len(prefix) > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} deep")
            for _ in range(unpacker.read_map_header()):
                path = (*prefix, unpacker.unpack())
                if _is_map(data[unpacker.tell()]) and not _is_chunked(data, unpacker.tell()):
                    yield from walk(path)
                else:
                    yield _name(path)

        yield from walk(())
        if unpacker.tell() != len(data):
            raise ValueError(f"{len(data) - unpacker.tell()} bytes behind the tree")

    spans = _spans(file, entries)
    loaders = {
        name: functools.partial(_leaf, data[begin:end]) for name, (begin, end) in spans.items()
    }
    return lazy.Tensors(loaders, str(file))


def _name(path: Any) -> str:
    path = tuple(path)
    if not all(isinstance(part, str) for part in path):
        raise ValueError(f"a path of {path!r:.80}")
    return "/".join(path)


def _spans(file: pathlib.Path, entries: Callable) -> dict[str, tuple[int, int]]:
    """The byte range of every leaf. `entries` yields a name with the unpacker before its leaf."""
    import msgpack

    spans = {}
    size = file.stat().st_size
    with open(file, "rb") as stream:
        unpacker = msgpack.Unpacker(
            stream,
            read_size=1 << 20,
            max_buffer_size=_MAX_BYTES,
            max_array_len=size,
            max_map_len=size,
        )
        try:
            for name in entries(unpacker):
                if name in spans:
                    raise ValueError(f"{name} comes twice")
                begin = unpacker.tell()
                unpacker.skip()
                spans[name] = begin, unpacker.tell()
        except (
            msgpack.exceptions.UnpackException,
            ValueError,
            TypeError,
            IndexError,
            RecursionError,
            MemoryError,
        ) as error:
            raise errors.WeightsError(
                f"{file}: cut off or not the kind of msgpack its prefix says, near byte "
                f"{unpacker.tell()} of {size} ({error!r})"
            ) from error
    return spans


def _stream_leaf(raw: np.ndarray) -> np.ndarray:
    import msgpack

    return _leaf(msgpack.unpackb(raw, max_bin_len=_MAX_BYTES))


def _leaf(raw: Any) -> np.ndarray:
    """One leaf as flax serialises it: an array, or a map of chunks when above 1 GiB."""
    import msgpack

    value = msgpack.unpackb(raw, ext_hook=_array, max_bin_len=_MAX_BYTES, max_ext_len=_MAX_BYTES)
    if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
        shape, chunks = (
            [part[str(i)] for i in range(len(part))] for part in (value["shape"], value["chunks"])
        )
        value = np.concatenate(chunks).reshape(bounds.shape_of([int(n) for n in shape], "an array"))
    if isinstance(value, (bool, int, float)):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype not in _DTYPES.values():
        raise errors.WeightsError(f"a leaf holds no array of numbers but a {type(value).__name__}")
    return value


def _array(code: int, data: bytes) -> np.ndarray:
    """Flax's extension types: 1 an array, 3 a numpy scalar, both (shape, dtype name, bytes)."""
    import msgpack

    if code not in (1, 3):
        raise errors.WeightsError(f"msgpack extension type {code} is not an array")
    shape, kind, raw = msgpack.unpackb(data, max_bin_len=_MAX_BYTES)
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise errors.WeightsError(f"an array of dtype {kind!r}, which this reader does not know")
    return np.frombuffer(raw, _DTYPES[kind]).reshape(bounds.shape_of(shape, "an array"))


def _is_map(byte: int) -> bool:
    return 0x80 <= byte <= 0x8F or byte in (0xDE, 0xDF)


def _is_chunked(data: np.ndarray, offset: int) -> bool:
    # A map of three (one byte), whose first key is this string of 25 characters.
    return data[offset + 1 : offset + 27].tobytes() == b"\xb9__msgpack_chunked_array__"
