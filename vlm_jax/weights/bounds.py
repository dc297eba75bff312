"""Limits on what a file may ask for, checked before anything is allocated.

A checkpoint is input from outside: a few bytes of it can claim any size, place or nesting.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import math
import pathlib
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.data import file_kind
from vlm_jax.weights import errors

MAX_JSON_BYTES = 100 * 10**6  # of a header or a config; the safetensors format has the same limit
_MAX_AXES = 32
_MAX_OPCODES = 2_000_000  # 10,000 tensors take 300,000
_MAX_PICKLE_BYTES = 64 * 2**20

# Fields of configs: most are widths.
_MAX_SIZE = 2**20
_MAX_OF = {
    "depth": 1000, "num_res_blocks": 64, "num_heads": 2**12, "num_kv_heads": 2**12,
    "head_width": 2**12, "vocab_size": 2**31 - 1, "num_embeddings": 2**31 - 1,
    "max_tokens": 2**31 - 1,
}  # fmt: skip
_RANGE_OF = {"rope_theta": (1, 1e12), "rms_eps": (0, 1), "norm_eps": (0, 1)}
_DTYPES = ("float32", "bfloat16", "float16")
_MAX_LEVELS = 16  # entries of a tuple of sizes


def is_count(value: Any) -> bool:
    """Whether it is a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def shape_of(sizes: Any, what: str) -> tuple[int, ...]:
    """The sizes as a shape.

    Raises:
      WeightsError: not a list of whole numbers from 0, or more axes or elements than exist.
    """
    fits = isinstance(sizes, (list, tuple)) and all(map(is_count, sizes))
    if not fits or len(sizes) > _MAX_AXES or math.prod(n for n in sizes if n) > 2**62:
        raise errors.WeightsError(f"{what} has the shape {str(sizes)[:80]}, which no tensor has")
    return tuple(sizes)


def check_view(
    shape: Sequence[int], strides: Sequence[int], offset: int, available: int, what: str
) -> None:
    """Refuses a view that leaves its storage, or repeats it to more than it holds.

    Args:
      shape, strides, offset: of the view, in elements.
      available: elements of the storage.
      what: names the tensor.

    Raises:
      WeightsError: see above; also for negative numbers and what is not a whole number.
    """
    shape = shape_of(shape, what)
    whole = isinstance(strides, (list, tuple)) and all(map(is_count, (offset, *strides)))
    if not whole or len(strides) != len(shape):
        raise errors.WeightsError(
            f"{what} has the offset {offset} and strides {str(strides)[:80]}; both must be whole "
            f"numbers from 0, one stride for each of its {len(shape)} axes"
        )
    size = math.prod(shape)
    last = offset + sum(step * (n - 1) for step, n in zip(strides, shape))
    if size and (last >= available or size > available):
        raise errors.WeightsError(
            f"{what} reaches element {last} (of {size} in all) of a storage of {available}; "
            "where it was made, save the values themselves (torch: tensor.clone()), not a view"
        )


def check_apart(spans: Mapping[str, tuple[int, int]], what: str) -> None:
    """Refuses tensors that share bytes: every writer lays them one behind another.

    Args:
      spans: (first byte, byte behind the last) by name.
      what: names the file.

    Raises:
      WeightsError: two of them overlap.
    """
    placed = sorted((begin, end, name) for name, (begin, end) in spans.items() if begin < end)
    for (_, end, name), (begin, _, other) in itertools.pairwise(placed):
        if begin < end:
            raise errors.WeightsError(
                f"{what}: {other} begins at byte {begin}, {name} ends at {end}: damaged, since no "
                "two tensors share bytes; fetch it again"
            )


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object, with or without a byte order mark.

    Raises:
      ValueError: not JSON, not an object, a name twice, or nested too deeply.
    """
    try:
        parsed = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"holds a {type(parsed).__name__} where an object was expected")
    return parsed


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      WeightsError: see `parse_json`; the message names the file.
      FileNotFoundError: there is none.
    """
    if reason := file_kind.not_data(file):
        raise errors.WeightsError(f"{file} {reason}")
    if (size := file.stat().st_size) > MAX_JSON_BYTES:
        raise errors.WeightsError(f"{file}: {size:,} bytes are too many for a JSON file")
    try:
        return parse_json(file.read_bytes())
    except ValueError as error:
        raise errors.WeightsError(f"{file}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} comes twice")
    return found


def make_config(cls: type, **fields: Any) -> Any:
    """`cls(**fields)` of a network's config, once every field has its type and a possible size.

    Raises:
      WeightsError: a field that has not, with its value.
      TypeError: unknown or missing fields. ValueError: the config's own checks.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name, value in fields.items():
        most = _MAX_OF.get(name, _MAX_SIZE)
        match known[name].type if name in known else "":
            case "int":
                # 0 only where it means something: the default of such a field.
                least = 0 if known[name].default == 0 else 1
                good, wanted = is_count(value) and least <= value <= most, f"{least} to {most:,}"
            case "float":
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                least, most = _RANGE_OF.get(name, (0, 1e30))
                good, wanted = number and least <= value <= most, f"{least} to {most:g}"
                fields[name] = float(value) if good else value
            case "bool":
                good, wanted = isinstance(value, bool), "true or false"
            case "tuple[int, ...]":
                good = isinstance(value, (list, tuple)) and len(value) <= _MAX_LEVELS
                good = good and all(is_count(size) and size <= _MAX_SIZE for size in value)
                wanted = f"a list of up to {_MAX_LEVELS} sizes"
            case "str" if name.endswith("dtype"):
                good, wanted = value in _DTYPES, f"one of {', '.join(_DTYPES)}"
            case "str":
                good, wanted = isinstance(value, str), "text"
            case _:
                good, wanted = True, ""
        if not good:
            raise errors.WeightsError(f"{name} is {value!r:.40}, not {wanted}")
    return cls(**fields)


def check_pickle(content: bytes) -> None:
    """Refuses a pickle that could keep the interpreter busy or fill its memory.

    Raises:
      WeightsError: too many bytes or instructions, or a place of its memo that no writer uses.
      ValueError: cut off, or no pickle.
    """
    if len(content) > _MAX_PICKLE_BYTES:
        raise errors.WeightsError(f"a pickle of {len(content):,} bytes is not a list of tensors")
    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
        # Writers number the memo from 0; the interpreter's is an array.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise errors.WeightsError(f"its pickle remembers object {argument:,} of {count:,}")
        if count > _MAX_OPCODES:
            raise errors.WeightsError(f"its pickle has over {_MAX_OPCODES:,} instructions")


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of one file in a zip.

    Raises:
      WeightsError: it inflates to more than the archive has bytes.
      KeyError, BadZipFile: it is not there, or damaged.
    """
    check_member(archive, archive.getinfo(name))
    return archive.read(name)


def check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuses a member that inflates to more than the archive has bytes; torch only stores."""
    archive.fp.seek(0, io.SEEK_END)
    if member.file_size > (size := archive.fp.tell()):
        raise errors.WeightsError(
            f"{member.filename} inflates to {member.file_size:,} bytes, the archive has {size:,}: "
            "weights are stored as they are"
        )
