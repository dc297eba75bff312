"""Checkpoint files of other programs as a lazy mapping from tensor name to numpy array.

    read("model.safetensors")               one file, a *.index.json of shards, or a folder
    read("pytorch_model.bin")               torch: .bin .pth .pt .ckpt, also an index of shards, and
                                            TorchScript archives
    read("params::streaming_params")        EasyLM stream of parameters
    read("trainstate::streaming_train_state")         EasyLM stream of the whole training state
    read("trainstate_params::streaming_train_state")  ... only the paths below params/params
    read("flax_params::params.msgpack")     one nested flax dict of parameters
    read("model.Q4_1.gguf")                 llama.cpp, dequantised to float32

Nothing is loaded before its name is asked for, so converting a large model needs the memory of one
model. No file is ever unpickled: torch files go through `weights_only=True`, and a file that asks
for more (`torch_file`) is refused. bfloat16 arrives as `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.data import file_kind
from vlm_jax.weights import (
    bounds,
    errors,
    flax_file,
    gguf,
    lazy,
    safetensors_file,
    torch_file,
    torchscript,
    wrappers,
)

# In a folder the first of these that is there: suffix, and the file that transformers takes
# before an index of shards.
_KINDS = (
    (".safetensors", "model.safetensors"),
    (".bin", "pytorch_model.bin"),
    *((suffix, "") for suffix in (*torch_file.SUFFIXES[1:], ".gguf")),
)
# Beside the weights in the folder of a training run; adapters are told apart below.
_NOT_WEIGHTS = re.compile(
    r"training_args\.bin|(optimizer|scheduler|scaler|sampler)(_\d+)?\.\w+|rng_state.*\.\w+"
)
_COPY = re.compile(r"consolidated\..*")  # the same weights once more, in Meta's names
_ADAPTER = re.compile(r"adapter_model\.(safetensors|bin)")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def read(path: str | os.PathLike) -> lazy.Tensors:
    """Opens a checkpoint; see the top of this file for what is recognised.

    What training frameworks put in front of every name (`module.`, `_orig_mod.`) is gone, and fp8
    weights with scales are multiplied out; see `wrappers`.

    Raises:
      FileNotFoundError: nothing there, a shard is missing, or a folder without weights.
      WeightsError: unknown, ambiguous, cut off, damaged or unsafe file, an adapter alone, or a
        torch file and torch is missing or older than 2.6; the message names the remedy.
    """
    prefix, separator, rest = os.fspath(path).partition("::")
    if separator:
        if prefix not in _MSGPACK:
            raise errors.WeightsError(
                f"unknown prefix {prefix!r} in {path}; known: {', '.join(_MSGPACK)}"
            )
        return _MSGPACK[prefix](_real(_existing(rest)))
    file = _existing(path)
    if file.is_dir():
        found = _weights_in(file)
        tensors = _read_file(found) if isinstance(found, pathlib.Path) else _joined(file, found)
    else:
        tensors = _read_file(file)
    return wrappers.unwrapped(tensors)


def _read_file(file: pathlib.Path) -> lazy.Tensors:
    if file.name.endswith(".index.json"):
        return _read_index(file)
    if file.suffix == ".safetensors":
        return safetensors_file.read(_real(file))
    if file.suffix in torch_file.SUFFIXES:
        reader = torchscript if torchscript.is_archive(file) else torch_file
        return reader.read(_real(file))
    if file.suffix == ".gguf":
        return gguf.read(_real(file))
    if file.suffix == ".msgpack" or file.name.startswith("streaming_"):
        raise errors.WeightsError(
            f"{file}: say what the msgpack holds with a prefix, for example params::{file} "
            f"(one of {', '.join(p + '::' for p in _MSGPACK)})"
        )
    raise errors.WeightsError(
        f"{file}: unknown extension {file.suffix!r}; expected .safetensors, "
        f"{', '.join(torch_file.SUFFIXES)}, .gguf, an .index.json of shards, a folder holding one "
        "of these, or an EasyLM file behind a prefix such as params::"
    )


def folder_of(path: str | os.PathLike) -> pathlib.Path:
    """The folder of a checkpoint path, with or without a prefix: where its config.json lies."""
    file = pathlib.Path(os.fspath(path).rpartition("::")[2]).expanduser()
    return file if file.is_dir() else file.parent


def read_config(file: pathlib.Path, native: type, from_upstream: Callable) -> Any:
    """The config of a checkpoint, from the config.json beside its weights.

    Args:
      file: the config.json.
      native: our config's class, whose fields `weights.export` wrote.
      from_upstream: takes the dict of a published config.

    Raises:
      WeightsError: not JSON, or fields that do not make a config.
    """
    fields = bounds.read_json(file)
    try:
        if "system" in fields:
            return bounds.make_config(native, **fields["model"])
        return from_upstream(fields)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise errors.WeightsError(f"{file}: {error}") from error


def _existing(path: str | os.PathLike) -> pathlib.Path:
    file = pathlib.Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"no such checkpoint: {file}")
    if (file / "checkpoints").is_dir() or (file / "COMMIT.json").exists():
        raise errors.WeightsError(
            f"{file} is a run of ours, not a file of weights. init.run={file} starts training from "
            f"it, vlm_jax.load reads it, and python -m vlm_jax.tools.convert_weights --from={file} "
            "writes its weights"
        )
    return file


def _real(file: pathlib.Path) -> pathlib.Path:
    if reason := file_kind.not_data(file):
        raise errors.WeightsError(f"{file} {reason}")
    return file


def _weights_in(folder: pathlib.Path) -> pathlib.Path | list[pathlib.Path]:
    """What to read in a folder: one file, or all shards of a set that has no index."""
    files = sorted(file for file in folder.iterdir() if not _NOT_WEIGHTS.fullmatch(file.name))
    adapters = [file.name for file in files if _ADAPTER.fullmatch(file.name)]
    found = _first_kind([file for file in files if file.name not in adapters])
    if adapters:
        base = f"it would be left out of {found[0].name}" if found else "its base is not there"
        raise errors.WeightsError(
            f"{folder} holds the LoRA adapter {', '.join(adapters)}: {base}. Merge it with peft "
            "(model.merge_and_unload()) and save the result"
            + (f", or name {found[0]} to go without" if found else "")
        )
    if not found:
        suffixes = ", ".join(f"*{suffix}" for suffix, _ in _KINDS)
        there = ", ".join(sorted(f"{file.name:.60}" for file in folder.iterdir())[:8])
        raise FileNotFoundError(
            f"{folder} holds no weights; looked for {suffixes}, found {there or 'nothing'}"
        )
    shards = [_SHARD.fullmatch(file.name) for file in found]
    if len(found) == 1 and not shards[0]:
        return found[0]
    if not all(shards) or len({(m[1], m[3], m[4]) for m in shards}) > 1:
        names = ", ".join(file.name for file in found)
        raise errors.WeightsError(f"{folder} holds several weights: {names}; name one of them")
    stem, _, total, suffix = shards[0].groups()
    wanted = [f"{stem}-{i + 1:05d}-of-{total}{suffix}" for i in range(int(total))]
    _require_shards(folder, set(wanted))
    return [folder / name for name in wanted]


def _first_kind(files: list[pathlib.Path]) -> list[pathlib.Path]:
    """The files of the first kind that is there; an index of shards stands for its shards."""
    for suffix, usual in _KINDS:
        found = [file for file in files if file.suffix == suffix]
        if usual in (file.name for file in found):
            return [
                f for f in found if not _COPY.fullmatch(f.name) and not _SHARD.fullmatch(f.name)
            ]
        if indices := [file for file in files if file.name.endswith(suffix + ".index.json")]:
            return indices
        if found:
            return found
    return []


def _joined(folder: pathlib.Path, files: list[pathlib.Path]) -> lazy.Tensors:
    """The tensors of all shards, none of them twice."""
    loaders: dict[str, lazy.Loader] = {}
    for file in files:
        tensors = _read_file(file)
        if twice := [name for name in tensors if name in loaders]:
            raise errors.WeightsError(f"{file}: {twice[:5]} are in another shard too")
        loaders |= {name: lazy.item(tensors, name) for name in tensors}
    return lazy.Tensors(loaders, str(folder))


def _read_index(index: pathlib.Path) -> lazy.Tensors:
    """The tensors of the shards that an index lists.

    Tensors that it does not list come along, so that what reads them can say what they are.
    """
    weight_map = bounds.read_json(_real(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise errors.WeightsError(f"{index}: not an index of shards: no weight_map in it")
    shards = sorted(set(map(str, weight_map.values())))
    for name in shards:
        plain = name == pathlib.PurePath(name).name and "\\" not in name
        if not plain or not name.endswith((".safetensors", *torch_file.SUFFIXES)):
            raise errors.WeightsError(
                f"{index}: shard names must be plain file names of weights: {name!r}"
            )
    _require_shards(index.parent, set(shards))
    tensors = _joined(index.parent, [index.parent / name for name in shards])
    if lost := [name for name in weight_map if name not in tensors]:
        raise errors.WeightsError(f"{index} and its shards disagree: not in shards {lost[:5]}")
    return lazy.Tensors({name: lazy.item(tensors, name) for name in tensors}, str(index))


def _require_shards(folder: pathlib.Path, names: set[str]) -> None:
    if absent := sorted(name for name in names if not (folder / name).is_file()):
        raise FileNotFoundError(f"{folder}: missing shards: {', '.join(absent[:10])}")


_MSGPACK: Mapping[str, Callable[[pathlib.Path], lazy.Tensors]] = {
    "trainstate": flax_file.read_stream,
    "trainstate_params": functools.partial(flax_file.read_stream, below="params/params/"),
    "params": flax_file.read_stream,
    "flax_params": flax_file.read_nested,
}
