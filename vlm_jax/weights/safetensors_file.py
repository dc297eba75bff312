"""safetensors: 8 bytes of header length, a JSON header, raw little-endian data.

The data are mapped, not copied. `weights.export` writes the format.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.weights import bounds, errors, lazy

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read(file: pathlib.Path) -> lazy.Tensors:
    """Opens a file.

    Raises:
      WeightsError: cut off, damaged, or of a dtype that is not in the table above.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise errors.WeightsError(
                f"{file}: cut off or not safetensors: its header wants {length} bytes, the file "
                f"has {size}"
            )
        if length > bounds.MAX_JSON_BYTES:
            raise errors.WeightsError(f"{file}: not safetensors: a header of {length:,} bytes")
        try:
            header = bounds.parse_json(stream.read(length))
        except ValueError as error:
            raise errors.WeightsError(f"{file}: not a safetensors file ({error})") from error
    metadata = header.pop("__metadata__", {})
    start = 8 + length
    entries = {name: _entry(name, info, file, size - start) for name, info in header.items()}
    bounds.check_apart({name: entry[2:] for name, entry in entries.items()}, str(file))
    data = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))[start:]

    def loader(dtype, shape, begin, end):
        return lambda: data[begin:end].view(dtype).reshape(shape)

    return lazy.Tensors(
        {name: loader(*entry) for name, entry in entries.items()}, str(file), metadata
    )


def _entry(name: str, info: Any, file: pathlib.Path, available: int) -> tuple:
    """(dtype, shape, begin, end) of a tensor, checked."""
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise errors.WeightsError(
            f"{file}: not a safetensors file (entry {name!r} is {info!r:.80})"
        )
    code, offsets = info["dtype"], info["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise errors.WeightsError(
            f"{file}: {name} has the dtype {code!r}, which this reader does not know; it knows "
            f"{', '.join(DTYPES)}. Save the weights as one of them where they were made"
        )
    dtype, shape = np.dtype(DTYPES[code]), bounds.shape_of(info["shape"], f"{file}: {name}")
    whole = isinstance(offsets, list) and len(offsets) == 2 and all(map(bounds.is_count, offsets))
    if not whole or offsets[1] - offsets[0] != dtype.itemsize * math.prod(shape):
        raise errors.WeightsError(f"{file}: {name} is {dtype}{shape} but has the bytes {offsets}")
    if offsets[1] > available:
        raise errors.WeightsError(
            f"{file}: cut off: {name} ends at byte {offsets[1]} of the data, which has "
            f"{available}; fetch it again"
        )
    return dtype, shape, *offsets
