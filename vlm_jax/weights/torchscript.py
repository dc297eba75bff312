"""The tensors of a TorchScript archive (`torch.jit.save`), without running anything in it.

OpenAI published CLIP as such archives. One is a zip of `NAME/data.pkl`, the object tree as a
pickle, `NAME/data/KEY`, raw little-endian storages, and `NAME/code/...`, which we do not open. The
pickle is read by an unpickler that knows six names of torch, each of them replaced by a function
below, and makes empty objects of the archive's own classes; any other name is refused.
"""

from __future__ import annotations

import collections
import functools
import io
import math
import os
import pathlib
import pickle
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.weights import errors, readers

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
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") for name in names)


def read(path: str | os.PathLike) -> readers.Tensors:
    """Parameters and buffers under the names of the module's state dict, each read when asked for.

    Raises:
      WeightsError: damaged, or its pickle names anything but tensors and the archive's classes.
    """
    path = pathlib.Path(path).expanduser()
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = pickles[0].removesuffix("data.pkl")
            tree = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
    except errors.WeightsError as error:
        raise errors.WeightsError(f"{path}: refused: {error}") from error
    except Exception as error:  # hostile bytes raise every kind
        raise errors.WeightsError(
            f"{path}: not a whole TorchScript archive ({error!r}). Remedy: save the module's "
            "state_dict() as safetensors where it was made"
        ) from error
    return readers.Tensors(
        {name: functools.partial(_load, path, root, x) for name, x in _walk(tree, "", set())},
        str(path),
    )


class _Module:
    """An object of the archive's own classes: attributes and nothing else."""

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Tensor:
    """Where a tensor lies."""

    def __init__(self, storage, offset, shape, strides):
        (self.dtype, self.key), self.offset = storage, offset
        self.shape, self.strides = tuple(shape), tuple(strides)


def _rebuild(storage, offset, shape, strides, *_):
    return _Tensor(storage, offset, shape, strides)


_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch.jit._pickle", "restore_type_tag"): lambda value, *_: value,
    **{("torch.jit._pickle", f"build_{kind}list"): list
       for kind in ("int", "double", "bool", "tensor")},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        raise errors.WeightsError(f"its pickle asks for {module}.{name}, which tensors do not need")

    def persistent_load(self, pid: Any) -> tuple[np.dtype, str]:
        _, dtype, key, *_ = pid
        if not isinstance(dtype, np.dtype):
            raise errors.WeightsError(f"a storage of unknown type {dtype!r}")
        return dtype, str(key)


def _walk(node: Any, prefix: str, open_nodes: set[int]):
    if isinstance(node, _Tensor):
        yield prefix, node
    elif isinstance(node, _Module) and id(node) not in open_nodes:
        for name, child in vars(node).items():
            yield from _walk(child, f"{prefix}.{name}" if prefix else name, open_nodes | {id(node)})


def _load(path: pathlib.Path, root: str, tensor: _Tensor) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        data = np.frombuffer(archive.read(f"{root}data/{tensor.key}"), tensor.dtype)
    size = math.prod(tensor.shape)
    dense = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    if size and any(s != d for s, d, n in zip(tensor.strides, dense, tensor.shape) if n > 1):
        steps = [step * tensor.dtype.itemsize for step in tensor.strides]
        last = tensor.offset + sum(s * (n - 1) for s, n in zip(tensor.strides, tensor.shape))
        if min(steps, default=0) < 0 or last >= len(data):
            raise errors.WeightsError(f"{path}: a tensor reaches past its storage {tensor.key}")
        view = np.lib.stride_tricks.as_strided(data[tensor.offset :], tensor.shape, steps)
        return np.ascontiguousarray(view)
    if tensor.offset + size > len(data):
        raise errors.WeightsError(f"{path}: a tensor reaches past its storage {tensor.key}")
    return data[tensor.offset : tensor.offset + size].reshape(tensor.shape)
