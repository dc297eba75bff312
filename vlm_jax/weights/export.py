"""Writes checkpoints: safetensors shards, their index, config.json.

    export.write(folder, export.hf(llama, params, cfg))        what transformers reads
    export.write(folder, export.native("name", params, cfg))   our own paths, '/'-joined

One tensor is in memory at a time beside the parameters. Files are written under a temporary name
and renamed, so a cut-off export is never mistaken for a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_jax.weights import convert, errors, safetensors_file, torch_file

MAX_SHARD_BYTES = 5 * 10**9
_CODES = {np.dtype(dtype): code for code, dtype in safetensors_file.DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is to be written.

    Attributes:
      tensors: name -> function returning the array.
      shapes: name -> its shape.
      dtype: of every tensor in the file.
      stem: file name without number and extension.
      metadata: of the safetensors header.
      files: file name -> JSON content, written beside the weights.
    """

    tensors: Mapping[str, Callable[[], np.ndarray]]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: np.dtype
    stem: str
    metadata: Mapping[str, str]
    files: Mapping[str, Any]


def hf(network, params: Mapping[str, Any], cfg, dtype="float32", **ids: int) -> Checkpoint:
    """In the names and layout of the network's public releases.

    Args:
      network: a module of `weights` with a public layout, `weights.llama` for example.
      params: our parameters, training layout.
      cfg: the network's config.
      dtype: of the file.
      **ids: `bos_token_id`, `eos_token_id` of a text model. LVM has no eos: transformers' default,
        2, is an image code, at which generation would stop inside an image.
    """
    dtype = np.dtype(dtype)
    config = network.config_to_hf(cfg) | ids
    files = {"config.json": config}
    if "eos_token_id" in config:
        config |= {"torch_dtype": dtype.name, "dtype": dtype.name}  # transformers 4 and 5
        files["config.json"] = config
        files["generation_config.json"] = {
            key: config[key] for key in ("bos_token_id", "eos_token_id")
        }
    tensors = network.to_hf(params, cfg)
    shapes = convert.reverted_shapes(params, network.HF_RULES)
    return Checkpoint(tensors, shapes, dtype, network.HF_STEM, {"format": "pt"}, files)


def native(system: str, params: Mapping[str, Any], cfg, dtype="float32") -> Checkpoint:
    """Our own tree: safetensors with '/'-joined paths, config.json {"system", "model"}."""
    config = {"system": system, "model": dataclasses.asdict(cfg)}
    tensors = convert.revert(params, convert.NATIVE_RULES)
    shapes = convert.reverted_shapes(params, convert.NATIVE_RULES)
    metadata = {"format": "vlm_jax"}
    return Checkpoint(tensors, shapes, np.dtype(dtype), "params", metadata, {"config.json": config})


def write(
    folder: str | os.PathLike, checkpoint: Checkpoint, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, str]:
    """Writes a checkpoint into a folder.

    Returns:
      weight file name -> sha256 of the file.

    Raises:
      FileExistsError: the folder already holds weights; nothing is overwritten.
      WeightsError: values that are not finite, or not in that dtype.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if held := sorted(file.name for file in folder.glob("*.safetensors*")):
        raise FileExistsError(f"{folder} already holds {', '.join(held)}; choose another folder")
    shards = _shards(checkpoint, max_shard_bytes)
    names = [f"{checkpoint.stem}.safetensors"]
    if len(shards) > 1:
        names = [
            f"{checkpoint.stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            for i in range(len(shards))
        ]
    digests = {}
    for name, shard in zip(names, shards):
        digests[name] = _write_shard(folder / name, checkpoint, shard)
    files = dict(checkpoint.files)
    if len(shards) > 1:
        files[f"{checkpoint.stem}.safetensors.index.json"] = {
            "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
            "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard},
        }
    for name, content in files.items():
        _write_text(folder / name, json.dumps(content, indent=2) + "\n")
    return digests


def write_file(
    path: str | os.PathLike, checkpoint: Checkpoint, beside: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Writes the tensors of a checkpoint alone, into one file whose suffix says the format.

    Args:
      path: .safetensors, or one of torch's.
      checkpoint: its stem and files are not used.
      beside: of a torch file, see `torch_file.write`.

    Returns:
      File name -> sha256 of the file.

    Raises:
      WeightsError: another suffix, torch is missing, or values that the dtype cannot hold.
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        (shard,) = _shards(checkpoint, sys.maxsize)
        return {path.name: _write_shard(path, checkpoint, shard)}
    if path.suffix not in torch_file.SUFFIXES:
        raise errors.WeightsError(
            f"{path}: the suffix {path.suffix!r} names no format; "
            f"{', '.join(torch_file.SUFFIXES)} are torch's, .safetensors is the other"
        )
    torch_file.write(path, checkpoint.tensors, checkpoint.dtype, beside)
    with open(path, "rb") as file:
        return {path.name: hashlib.file_digest(file, "sha256").hexdigest()}


def _shards(checkpoint: Checkpoint, max_bytes: int) -> list[dict[str, int]]:
    """Tensor name -> bytes, cut where the next tensor would not fit."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in checkpoint.shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * checkpoint.dtype.itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_bytes:
            shards.append({})
        shards[-1][name] = size
    return shards


def _write_shard(file: pathlib.Path, checkpoint: Checkpoint, shard: Mapping[str, int]) -> str:
    header: dict[str, Any] = {"__metadata__": dict(checkpoint.metadata)}
    offset = 0
    for name, size in shard.items():
        header[name] = {
            "dtype": _CODES[checkpoint.dtype],
            "shape": list(checkpoint.shapes[name]),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data then begins aligned, as the format recommends
    digest = hashlib.sha256()
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as stream:

            def put(data):
                stream.write(data)
                digest.update(data)

            put(len(text).to_bytes(8, "little") + text)
            for name in shard:
                array = convert.cast(checkpoint.tensors[name](), checkpoint.dtype, name)
                put(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def _write_text(file: pathlib.Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)
