"""The tensors of a TorchScript archive (`torch.jit.save`), without running anything in it.

OpenAI published CLIP as such archives. One is a zip of `NAME/data.pkl`, the object tree as a
pickle, `NAME/data/KEY`, raw little-endian storages, and `NAME/code/...`, which we do not open. The
pickle is read by an unpickler that knows six names of torch, each of them replaced by a function
below, and makes empty objects of the archive's own classes; any other name is refused.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.weights import bounds, errors, lazy

_MAX_NODES, _MAX_DEPTH, _MAX_NAME = 200_000, 100, 1000  # of the tree of modules
_STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip


def is_archive(path: str | os.PathLike) -> bool:
    """Whether the file is a zip with TorchScript code in it."""
    path = pathlib.Path(path).expanduser()
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def read(path: str | os.PathLike) -> lazy.Tensors:
    """Parameters and buffers under the names of the module's state dict, each read when asked for.

    Raises:
      WeightsError: damaged, or its pickle names anything but tensors and the archive's classes.
    """
    path = pathlib.Path(path).expanduser()
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = pickles[0].removesuffix("data.pkl")
            content = bounds.read_member(archive, pickles[0])
        bounds.check_pickle(content)
        tree = _Unpickler(io.BytesIO(content)).load()
        found = dict(_walk(tree))
    except errors.WeightsError as error:
        raise errors.WeightsError(f"{path}: refused: {error}") from error
    except Exception as error:  # hostile bytes raise every kind
        raise errors.WeightsError(
            f"{path}: not a whole TorchScript archive ({error!r}). Remedy: save the module's "
            "state_dict() as safetensors where it was made"
        ) from error
    return lazy.Tensors(
        {name: functools.partial(_load, path, root, x) for name, x in found.items()}, str(path)
    )


class _Module:
    """An object of the archive's own classes: its attributes and nothing else."""

    def __setstate__(self, state):
        # Not copied: a pickle may give one dict to any number of objects.
        self.attributes = state if isinstance(state, dict) else {}


class _Tensor:
    """Where a tensor lies."""

    def __init__(self, storage, offset, shape, strides):
        (self.kind, self.key), self.offset = storage, offset
        self.shape, self.strides = bounds.shape_of(shape, f"storage {self.key}"), strides


def _rebuild(storage, offset, shape, strides, *_):
    return _Tensor(storage, offset, shape, strides)


def _same(value, *_):
    return value


_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _same,
    ("collections", "OrderedDict"): lambda: {},
    ("torch.jit._pickle", "restore_type_tag"): _same,
    **{("torch.jit._pickle", f"build_{kind}list"): _same
       for kind in ("int", "double", "bool", "tensor")},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name in _STORAGES:
            return name
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        raise errors.WeightsError(f"its pickle asks for {module}.{name}, which tensors do not need")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, kind, key, *_ = pid
        if kind not in _STORAGES:
            raise errors.WeightsError(f"a storage of unknown type {kind!r}")
        return kind, str(key)


def _walk(tree: Any) -> Iterator[tuple[str, _Tensor]]:
    """Every tensor under the names of its attributes; a module in two places has two names."""
    waiting, seen = [("", tree, frozenset())], 0
    while waiting:
        prefix, node, above = waiting.pop()
        seen += 1
        # Modules that share modules, over and over, would have more names than atoms.
        if seen > _MAX_NODES or len(above) > _MAX_DEPTH or len(prefix) > _MAX_NAME:
            raise errors.WeightsError(f"its modules are too many or too deep, at {prefix[:80]!r}")
        if isinstance(node, _Tensor):
            yield prefix, node
        elif isinstance(node, _Module) and id(node) not in above:
            inside = above | {id(node)}
            waiting += [
                (f"{prefix}.{name}" if prefix else str(name), child, inside)
                for name, child in reversed(getattr(node, "attributes", {}).items())
            ]


def _load(path: pathlib.Path, root: str, tensor: _Tensor) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        raw = bounds.read_member(archive, f"{root}data/{tensor.key}")
    dtype = np.dtype(_STORAGES[tensor.kind])
    data = np.frombuffer(raw, dtype)
    bounds.check_view(
        tensor.shape, tensor.strides, tensor.offset, len(data), f"{path}: storage {tensor.key}"
    )
    if not math.prod(tensor.shape):
        return np.zeros(tensor.shape, dtype)
    steps = [step * dtype.itemsize for step in tensor.strides]
    view = np.lib.stride_tricks.as_strided(data[tensor.offset :], tensor.shape, steps)
    return np.ascontiguousarray(view).reshape(tensor.shape)
