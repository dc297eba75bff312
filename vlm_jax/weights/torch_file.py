"""State dicts of torch (.bin .pth .pt .ckpt), read through its restricted loader, and written.

There is no other loader to fall back to: a file that asks for more than tensors and what training
scripts keep beside them (numpy's numbers, `argparse.Namespace`) is refused.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.weights import bounds, convert, errors, lazy

SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
# Files of a training run hold the weights under one of these, beside counters and moments.
_STATE = ("state_dict", "model", "model_state_dict", "module")
_MAX_NESTED = 4
# torch's name of a dtype that numpy has not -> ours. Others go through torch's own conversion.
_FOREIGN = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}


def read(file: pathlib.Path) -> lazy.Tensors:
    """Opens a file; large ones are mapped.

    Raises:
      WeightsError: torch is missing or older than 2.6, or the file is damaged, unsafe, no state
        dict, or holds tensors that numpy cannot.
    """
    torch = _torch(file)
    with open(file, "rb") as stream:
        is_zip = stream.read(2) == b"PK"  # files written by torch before 1.6 are not, nor mappable
    try:
        mapped = is_zip and _check_archive(file)
        with torch.serialization.safe_globals(_harmless()):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds, all mean: not a plain file of tensors
        raise errors.WeightsError(
            f"{file}: refused: not a plain, complete file of tensors ({_reason(error)}). Nothing "
            "in it was executed. If you trust its origin, resave it as safetensors, its "
            "tensors alone, where it was made"
        ) from error
    state, source = _state_in(state, str(file))
    if not isinstance(state, Mapping):
        raise errors.WeightsError(f"{file}: holds a {type(state).__name__}, not a state dict")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise errors.WeightsError(f"{file}: not a state dict: {others[:5]} are not tensors")
    if len(set(map(str, state))) < len(state):
        raise errors.WeightsError(f"{file}: numbers and texts among its names mean the same")
    return lazy.Tensors(
        {str(name): _loader(tensor, f"{file}: {name}") for name, tensor in state.items()},
        source,
    )


def write(
    file: str | os.PathLike,
    state: Mapping[str, lazy.Loader],
    dtype: Any,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Writes a state dict, under a temporary name until it is complete.

    Args:
      file: to write or to replace.
      state: name -> function returning the array.
      dtype: of the file.
      beside: what lies beside the state dict, which then is under "model"; None writes it alone.

    Raises:
      WeightsError: torch is missing, or values that the dtype cannot hold.
    """
    torch = _torch(pathlib.Path(file))
    dtype = np.dtype(dtype)

    def tensor(name):
        x = np.array(convert.cast(state[name](), dtype, name), order="C")
        if dtype.name in _FOREIGN:
            return torch.from_numpy(x.view(np.int16)).view(getattr(torch, dtype.name))
        return torch.from_numpy(x)

    partial = f"{os.fspath(file)}.partial"
    try:
        tensors = {name: tensor(name) for name in state}
        torch.save(tensors if beside is None else {**beside, "model": tensors}, partial)
        os.replace(partial, file)
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if asked := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {asked[1]}"
    if "weights_only" in text:  # torch advises to unpickle it all the same
        return "its pickle holds more than tensors"
    return text.splitlines()[0] if text else repr(error)


def _torch(file: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise errors.WeightsError(
            f"{file} needs torch: pip install torch, or use the safetensors format"
        ) from error
    # Before 2.6 the restricted loader itself could be made to run code (CVE-2025-32434).
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise errors.WeightsError(
            f"{file}: torch {torch.__version__} is unsafe here; 2.6 or newer needed"
        )
    return torch


def _harmless() -> list[Any]:
    """What the loader may make besides tensors: these keep values and do nothing."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # numpy 1, 2
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [argparse.Namespace, np.dtype, *kinds, *((scalar, name) for name in names)]


def _check_archive(file: pathlib.Path) -> bool:
    """Whether the file may be mapped: torch would take compressed bytes for values."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            bounds.check_member(archive, member)
            if member.filename.endswith("data.pkl"):
                bounds.check_pickle(archive.read(member))
        return all(x.compress_type == zipfile.ZIP_STORED for x in archive.infolist())


def _state_in(state: Any, source: str) -> tuple[Any, str]:
    """The innermost dict of weights, and where it was found."""
    for _ in range(_MAX_NESTED):
        inner = [
            key
            for key in _STATE
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping)
        ]
        if not inner:
            break
        state, source = state[inner[0]], f"{source}, its {inner[0]!r}"
    return state, source


def _loader(tensor: Any, what: str) -> lazy.Loader:
    kind = str(tensor.dtype).removeprefix("torch.")
    if str(tensor.layout) != "torch.strided" or tensor.is_quantized or tensor.is_meta:
        raise errors.WeightsError(
            f"{what} is sparse, quantised or empty of values ({kind}); save it as a plain tensor"
        )
    available = tensor.untyped_storage().nbytes() // tensor.element_size()
    bounds.check_view(
        tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), available, what
    )

    def load() -> np.ndarray:
        import torch

        x = tensor.detach().resolve_conj().resolve_neg()
        if kind in _FOREIGN:
            bits = {1: torch.uint8, 2: torch.int16}[x.element_size()]
            return x.contiguous().view(bits).numpy().view(_FOREIGN[kind])
        try:
            return x.numpy()
        except (TypeError, RuntimeError) as error:
            raise errors.WeightsError(
                f"{what} has the dtype {kind}, which this reader does not know ({error}); save it "
                "as another where it was made"
            ) from error

    return load
