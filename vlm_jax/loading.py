"""`vlm_jax.load`: a trained system as an object with the system's natural verbs."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from etils import epath

from vlm_jax import saving
from vlm_jax import task as task_lib
from vlm_jax.checkpoints import commit_marker, step_folders
from vlm_jax.machines import compilation_cache, hardware, memory
from vlm_jax.program import config as config_lib
from vlm_jax.weights import convert, readers, shipped

if typing.TYPE_CHECKING:
    from vlm_jax.encoders import image_tokenizer
    from vlm_jax.systems import lvm, nxtp


@typing.overload
def load(
    system: Literal["lvm"],
    checkpoint: str,
    *,
    averaged: bool = True,
    tokenizer: str = "",
    context_images: int = ...,
    dtype: str = "",
    preset: str = "",
) -> lvm.Lvm: ...


@typing.overload
def load(
    system: Literal["nxtp"],
    checkpoint: str,
    *,
    averaged: bool = True,
    tokenizer: str = "",
    prompt: str = "",
    dtype: str = "",
    clip: str = "",
    llama: str = "",
) -> nxtp.Nxtp: ...


@typing.overload
def load(
    system: Literal["vqgan"], checkpoint: str, *, averaged: bool = True
) -> image_tokenizer.ImageTokenizer: ...


@typing.overload
def load(system: str, checkpoint: str, *, averaged: bool = True, **fields: Any) -> Any: ...


def load(system: str, checkpoint: str, *, averaged: bool = True, **fields: Any) -> Any:
    """Loads a system for inference; no config, mesh or flags needed.

    Args:
      system: "lvm", "vqgan", ...
      checkpoint: a work directory of ours (its newest good checkpoint is taken) or one of its
        step folders, a folder of `model.save` or `tools.export_run`, the name of weights that come
        with the package ("tiny"), or released weights in any format that the system reads. A step
        is made as its own meta.json says it was trained.
      averaged: of a run that kept a moving average of its parameters, take that; False takes the
        raw ones.
      **fields: of the system's `from_run` or `from_upstream`, for example `tokenizer=`.

    Returns:
      "lvm": `systems.lvm.Lvm`, "nxtp": `systems.nxtp.Nxtp`, "vqgan": `ImageTokenizer`; systems
      elsewhere name theirs.

    Raises:
      NotEnoughMemory: the parameters do not fit; said before they are read.
      FileNotFoundError: there is nothing at `checkpoint`.
      ValueError: unknown system, or the run belongs to another system; no device to run on; fields
        that such weights do not take.
      CheckpointError, ConversionError: the weights are damaged or do not fit.
    """
    hardware.require_devices()
    compilation_cache.enable()
    module = task_lib.resolve(system, "systems")
    path = pathlib.Path(shipped.folder_of(system, checkpoint)).expanduser()
    if config := saving.read_config(path):
        _require_system(config["system"], system, checkpoint)
        saving.check_files(path)
        if "task" in config:
            return _from_saved(module, config, path, fields)
    of_run = is_of_a_run(path)
    _check_fields(module.from_run if of_run else module.from_upstream, fields, checkpoint)
    if not of_run:
        model = module.from_upstream(checkpoint, **fields)
        return _noted(model, saving.Source(pathlib.Path(checkpoint).name))

    from vlm_jax import checkpoints

    try:
        step = checkpoints.find(path)
    except checkpoints.CheckpointError:
        _require_system(
            _system_of_workdir(epath.Path(path)), system, checkpoint
        )  # the graver mistake
        raise
    config = config_lib.place(step.config, str(step.folder.parent.parent))
    _require_system(config["system"], system, checkpoint)
    task = module.make_task(config["model"], **config.get("task", {}))
    formatter = module.make_formatter(**config.get("formatter", {}))
    abstract = {
        name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
        for name, leaf in step.leaves.items()
        if name.startswith("params/")
    }
    _require_memory(module, checkpoint, abstract, fields)
    params = checkpoints.load_params(step, averaged=averaged)
    source = saving.source_of_run(
        step.folder.parent.parent.name, step.number, config, averaged and step.has_average
    )
    return _noted(module.from_run(task, formatter, params, **fields), source)


def _check_fields(make: Callable[..., Any], fields: Mapping[str, Any], checkpoint: str) -> None:
    """Weights of one kind do not take what those of another need; said before they are read."""
    parameters = inspect.signature(make).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in fields:
        if name not in known and not any_name:
            raise config_lib.ConfigError(
                f"{checkpoint} is loaded without {name!r}{config_lib.nearest(name, known)}"
            )


def missing(system: str, checkpoint: str) -> str:
    """Why `load` will find nothing at a path, "" where it may find something."""
    path = str(shipped.folder_of(system, checkpoint)).rpartition("::")[2]
    if "://" in path or os.path.lexists(os.path.expanduser(path)):
        return ""
    return f"no such checkpoint: {checkpoint}"


def _from_saved(module: Any, config: dict[str, Any], path: pathlib.Path, fields: Any) -> Any:
    fields = {**config.get("load", {}), **fields}
    _check_fields(module.from_run, fields, str(path))
    task = module.make_task(config["model"], **config["task"])
    formatter = config_lib.call(module.make_formatter, config.get("formatter"), "formatter")
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    _require_memory(module, str(path), abstract, fields)
    params = convert.convert(readers.read(path), convert.NATIVE_RULES, abstract)
    model = module.from_run(task, formatter, params, **fields)
    return _noted(model, saving.source_of(config))


def _require_memory(module: Any, name: str, abstract: Any, fields: Mapping[str, Any]) -> None:
    """Refuses what does not fit; systems that compute with a copy say in which dtype it is."""
    copy_dtype = getattr(module, "copy_dtype", lambda dtype: "")(fields.get("dtype", ""))
    memory.require_for_loading(name, abstract, copy_dtype=copy_dtype)


def _noted(model: Any, source: saving.Source) -> Any:
    return model.comes_from(source) if isinstance(model, saving.Model) else model


def is_of_a_run(path: pathlib.Path) -> bool:
    """Whether this is a work directory, its checkpoints folder, or one step."""
    path = epath.Path(path).absolute()
    if not path.is_dir():
        return False
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    return bool(
        commit_marker.is_committed(path)
        or (step_folders.is_step(path) and path.parent.name == "checkpoints")
        or (folder.is_dir() and (step_folders.steps(folder) or _system_of_workdir(folder.parent)))
    )


def _require_system(found: str, wanted: str, checkpoint: str) -> None:
    if found and found != wanted:
        raise ValueError(f"{checkpoint} is a run of the system {found!r}, not of {wanted!r}")


def _system_of_workdir(path: epath.Path) -> str:
    """What the workdir's config.json calls itself, for a message; "" when that cannot be read."""
    try:
        return str(json.loads((path / "config.json").read_text())["config"]["system"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
