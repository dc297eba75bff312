"""Checkpoint files of other programs as a lazy mapping from tensor name to numpy array.

    read("model.safetensors")               one file, a *.index.json of shards, or a folder
    read("pytorch_model.bin")               torch: .bin .pth .pt, also a *.bin.index.json of shards
    read("params::streaming_params")        EasyLM stream of parameters
    read("trainstate::streaming_train_state")         EasyLM stream of the whole training state
    read("trainstate_params::streaming_train_state")  ... only the paths below params/params
    read("flax_params::params.msgpack")     one nested flax dict of parameters
    read("model.Q4_1.gguf")                 llama.cpp, dequantised to float32

Nothing is loaded before its name is asked for, so converting a large model needs the memory of one
model. No file is ever unpickled: torch files go through `weights_only=True`, and a file that asks
for more is refused. bfloat16 arrives as `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.weights import errors, gguf

TORCH_SUFFIXES = (".bin", ".pth", ".pt")
SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip

_Loader = Callable[[], np.ndarray]


class Tensors(Mapping[str, np.ndarray]):
    """Names to arrays, each loaded anew when it is asked for.

    Attributes:
      source: what was read, for messages.
      metadata: what the file says beside its tensors (GGUF key-values, safetensors metadata).
    """

    def __init__(self, loaders: Mapping[str, _Loader], source: str, metadata=None):
        self._loaders, self.source, self.metadata = dict(loaders), source, metadata or {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._loaders[name]()

    def __contains__(self, name: object) -> bool:  # the inherited one would load the tensor
        return name in self._loaders

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def renamed(self, rename: Callable[[str], str]) -> Tensors:
        """The same tensors under other names."""
        loaders = {rename(name): loader for name, loader in self._loaders.items()}
        return Tensors(loaders, self.source, self.metadata)


def read(path: str | os.PathLike) -> Tensors:
    """Opens a checkpoint; see the top of this file for what is recognised.

    Raises:
      FileNotFoundError: nothing there, a shard is missing, or a folder without weights.
      WeightsError: unknown, ambiguous, cut off, damaged or unsafe file, or a torch file and torch
        is missing or older than 2.6; the message names the remedy.
    """
    prefix, separator, rest = os.fspath(path).partition("::")
    if separator:
        if prefix not in _MSGPACK:
            raise errors.WeightsError(
                f"unknown prefix {prefix!r} in {path}; known: {', '.join(_MSGPACK)}"
            )
        return _MSGPACK[prefix](_existing(rest))
    file = _existing(path)
    if file.is_dir():
        file = _weights_in(file)
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in TORCH_SUFFIXES:
        return _read_torch(file)
    if file.suffix == ".gguf":
        opened = gguf.open_file(file)
        return Tensors(opened.loaders, str(file), opened.metadata)
    if file.suffix == ".msgpack" or file.name.startswith("streaming_"):
        raise errors.WeightsError(
            f"{file}: say what the msgpack holds with a prefix, for example params::{file} "
            f"(one of {', '.join(p + '::' for p in _MSGPACK)})"
        )
    raise errors.WeightsError(
        f"{file}: unknown extension {file.suffix!r}; expected .safetensors, "
        f"{', '.join(TORCH_SUFFIXES)}, .gguf, an .index.json of shards, a folder holding one of "
        "these, or an EasyLM file behind a prefix such as params::"
    )


def folder_of(path: str | os.PathLike) -> pathlib.Path:
    """The folder of a checkpoint path, with or without a prefix: where its config.json lies."""
    file = pathlib.Path(os.fspath(path).rpartition("::")[2])
    return file if file.is_dir() else file.parent


def read_config(file: pathlib.Path, native: Callable, from_upstream: Callable) -> Any:
    """The config of a checkpoint, from the config.json beside its weights.

    Args:
      file: the config.json.
      native: takes our own fields by keyword, as `weights.export` wrote them.
      from_upstream: takes the dict of a published config.

    Raises:
      WeightsError: not JSON, or fields that do not make a config.
    """
    try:
        fields = json.loads(file.read_text())
        if "system" in fields:
            return native(**fields["model"])
        return from_upstream(fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise errors.WeightsError(f"{file}: {error}") from error


def _existing(path: str | os.PathLike) -> pathlib.Path:
    file = pathlib.Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"no such checkpoint: {file}")
    return file


def _weights_in(folder: pathlib.Path) -> pathlib.Path:
    """The one thing to read in a folder: an index before single files, safetensors before torch."""
    patterns = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json",
                *(f"*{suffix}" for suffix in TORCH_SUFFIXES), "*.gguf")  # fmt: skip
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise errors.WeightsError(
                f"{folder} holds several {pattern}: {names}; name one of them"
            )
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder} holds no weights; looked for {', '.join(patterns)}")


def _read_shards(index: pathlib.Path) -> Tensors:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.WeightsError(f"{index}: not an index of shards ({error!r})") from error
    if any(pathlib.PurePath(name).name != name for name in shards):
        raise errors.WeightsError(f"{index}: shard names must be plain file names: {shards}")
    absent = [name for name in shards if not (index.parent / name).exists()]
    if absent:
        raise FileNotFoundError(f"{index}: missing shards: {', '.join(absent)}")
    opened = {name: read(index.parent / name) for name in shards}
    unlisted = [
        name for shard, tensors in opened.items() for name in tensors if name not in weight_map
    ]
    lost = [name for name, shard in weight_map.items() if name not in opened[shard]]
    if unlisted or lost:
        raise errors.WeightsError(f"{index} and its shards disagree: not in shards {lost}, "
                         f"not in the index {unlisted}")  # fmt: skip
    loaders = {name: _item(opened[shard], name) for name, shard in weight_map.items()}
    return Tensors(loaders, str(index))


def _item(tensors: Mapping[str, np.ndarray], name: str) -> _Loader:
    return lambda: tensors[name]


# ---- safetensors -----------------------------------------------------------------------------


def _read_safetensors(file: pathlib.Path) -> Tensors:
    """8 bytes header length, JSON header, raw little-endian data; mapped, not copied."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise errors.WeightsError(
                f"{file}: cut off or not safetensors: its header wants {length} bytes, the file "
                f"has {size}"
            )
        try:
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {name: _entry(**info) for name, info in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise errors.WeightsError(f"{file}: not a safetensors file ({error!r})") from error
    start = 8 + length
    for name, (dtype, shape, begin, end) in entries.items():
        if end - begin != dtype.itemsize * math.prod(shape) or begin < 0:
            raise errors.WeightsError(
                f"{file}: {name} is {dtype}{shape} but has {end - begin} bytes"
            )
        if start + end > size:
            raise errors.WeightsError(
                f"{file}: cut off: {name} ends at byte {start + end}, the file has {size}; fetch "
                "it again"
            )
    data = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))[start:]

    def loader(dtype, shape, begin, end):
        return lambda: data[begin:end].view(dtype).reshape(shape)

    return Tensors({name: loader(*entry) for name, entry in entries.items()}, str(file), metadata)


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple:
    begin, end = data_offsets
    return np.dtype(SAFETENSORS_DTYPES[dtype]), tuple(map(int, shape)), int(begin), int(end)


# ---- torch -----------------------------------------------------------------------------------


def _read_torch(file: pathlib.Path) -> Tensors:
    """A state dict through torch's restricted loader; there is no other loader to fall back to."""
    try:
        import torch
    except ImportError as error:
        raise errors.WeightsError(
            f"{file} needs torch to be read: pip install torch, or convert the file to safetensors"
        ) from error
    # Before 2.6 the restricted loader itself could be made to run code (CVE-2025-32434).
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise errors.WeightsError(
            f"{file}: torch {torch.__version__} is unsafe here; 2.6 or newer needed"
        )
    with open(file, "rb") as stream:
        is_zip = stream.read(2) == b"PK"  # files written by torch before 1.6 are not, nor mappable
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises many kinds, all mean: not a plain file of tensors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise errors.WeightsError(
            f"{file}: refused: not a plain, complete file of tensors ({reason}). Nothing in it was "
            "executed. If you trust its origin, resave it as safetensors where it was made"
        ) from error
    # Files of a training run hold the weights under one of these, beside counters and moments.
    while isinstance(state, Mapping) and (
        inner := [key for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)]
    ):
        state = state[inner[0]]
    if not isinstance(state, Mapping):
        raise errors.WeightsError(f"{file}: holds a {type(state).__name__}, not a state dict")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise errors.WeightsError(f"{file}: not a state dict: {others[:5]} are not tensors")

    def loader(tensor):
        if tensor.dtype == torch.bfloat16:
            return lambda: tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return lambda: tensor.numpy()

    return Tensors({name: loader(tensor) for name, tensor in state.items()}, str(file))


# ---- flax and EasyLM msgpack -----------------------------------------------------------------
#
# A stream is a bare sequence of pairs (path as a list of strings, bytes of one flax leaf). One
# pass notes where each leaf lies; leaves are unpacked from the mapped file when asked for.


def _read_stream(file: pathlib.Path, below: str = "") -> Tensors:
    def entries(unpacker):
        while True:
            if unpacker.tell() == file.stat().st_size:
                return
            if unpacker.read_array_header() != 2:
                raise errors.WeightsError("an item is not a pair (path, bytes)")
            yield "/".join(unpacker.unpack())

    spans = _spans(file, entries)
    data = np.memmap(file, dtype=np.uint8, mode="r")
    loaders = {
        name[len(below) :]: functools.partial(_stream_leaf, data[begin:end], name)
        for name, (begin, end) in spans.items()
        if name.startswith(below)
    }
    if not loaders:
        raise errors.WeightsError(
            f"{file}: no path begins with {below!r}; paths: {list(spans)[:5]} ..."
        )
    return Tensors(loaders, str(file))


def _read_nested(file: pathlib.Path) -> Tensors:
    """The whole tree in one msgpack map, as flax's `to_bytes` writes it."""

    def entries(unpacker):
        def walk(prefix):
            for _ in range(unpacker.read_map_header()):
                path = (*prefix, unpacker.unpack())
                if _is_map(data[unpacker.tell()]) and not _is_chunked(data, unpacker.tell()):
                    yield from walk(path)
                else:
                    yield "/".join(path)

        yield from walk(())

    data = np.memmap(file, dtype=np.uint8, mode="r")
    spans = _spans(file, entries)
    loaders = {
        name: functools.partial(_leaf, data[begin:end], name)
        for name, (begin, end) in spans.items()
    }
    return Tensors(loaders, str(file))


def _spans(file: pathlib.Path, entries: Callable) -> dict[str, tuple[int, int]]:
    """The byte range of every leaf. `entries` yields a name with the unpacker before its leaf."""
    import msgpack

    spans = {}
    with open(file, "rb") as stream:
        unpacker = msgpack.Unpacker(stream, read_size=1 << 20, max_buffer_size=2**32 - 1)
        try:
            for name in entries(unpacker):
                if name in spans:
                    raise errors.WeightsError(f"{name} comes twice")
                begin = unpacker.tell()
                unpacker.skip()
                spans[name] = begin, unpacker.tell()
        except (
            msgpack.exceptions.UnpackException,
            ValueError,
            TypeError,
            IndexError,
            RecursionError,
        ) as error:
            raise errors.WeightsError(
                f"{file}: cut off or not the kind of msgpack its prefix says, near byte "
                f"{unpacker.tell()} of {file.stat().st_size} ({error!r})"
            ) from error
    return spans


def _stream_leaf(raw: np.ndarray, name: str) -> np.ndarray:
    import msgpack

    return _leaf(msgpack.unpackb(raw, max_bin_len=2**32 - 1), name)


def _leaf(raw: Any, name: str) -> np.ndarray:
    """One leaf as flax serialises it: an array, or a map of chunks when above 1 GiB."""
    import msgpack

    value = msgpack.unpackb(raw, ext_hook=_array, max_bin_len=2**32 - 1, max_ext_len=2**32 - 1)
    if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
        ordered = [[part[str(i)] for i in range(len(part))]
                   for part in (value["shape"], value["chunks"])]  # fmt: skip
        value = np.concatenate(ordered[1]).reshape([int(size) for size in ordered[0]])
    value = np.asarray(value)
    if value.dtype == object:
        raise errors.WeightsError(f"{name}: holds no array but {type(value[()]).__name__}")
    return value


def _array(code: int, data: bytes) -> np.ndarray:
    """Flax's extension types: 1 an array, 3 a numpy scalar, both (shape, dtype name, bytes)."""
    import msgpack

    if code not in (1, 3):
        raise errors.WeightsError(f"msgpack extension type {code} is not an array")
    shape, dtype, raw = msgpack.unpackb(data, max_bin_len=2**32 - 1)
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return np.frombuffer(raw, dtype).reshape(shape)


def _is_map(byte: int) -> bool:
    return 0x80 <= byte <= 0x8F or byte in (0xDE, 0xDF)


def _is_chunked(data: np.ndarray, offset: int) -> bool:
    # A map of three (one byte), whose first key is this string of 25 characters.
    return data[offset + 1 : offset + 27].tobytes() == b"\xb9__msgpack_chunked_array__"


_MSGPACK = {
    "trainstate": _read_stream,
    "trainstate_params": functools.partial(_read_stream, below="params/params/"),
    "params": _read_stream,
    "flax_params": _read_nested,
}
