"""`vlm_jax.load`: a trained system as an object with the system's natural verbs."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from vlm_jax import task as task_lib


def load(system: str, checkpoint: str, **fields: Any) -> Any:
    """Loads a system for inference; no config, mesh or flags needed.

    Args:
      system: "lvm", "vqgan", ...
      checkpoint: a work directory of ours (its newest good checkpoint is taken) or one of its
        step folders, or released weights in any format that the system reads.
      **fields: of the system's `from_run` or `from_upstream`, for example `tokenizer=`.

    Returns:
      For "lvm" a `systems.lvm.Lvm`; other systems name theirs.

    Raises:
      FileNotFoundError: there is nothing at `checkpoint`.
      ValueError: unknown system, or the run belongs to another system.
      CheckpointError, ConversionError: the weights are damaged or do not fit.
    """
    module = task_lib.resolve(system, "systems")
    config = _config_of_run(pathlib.Path(checkpoint).expanduser())
    if config is None:
        return module.from_upstream(checkpoint, **fields)

    from vlm_jax import checkpoints

    if config["system"] != system:
        raise ValueError(
            f"{checkpoint} is a run of the system {config['system']!r}, not of {system!r}"
        )
    task = module.make_task(config["model"], **config.get("task", {}))
    formatter = module.make_formatter(**config.get("formatter", {}))
    params = checkpoints.load_params(checkpoint)
    return module.from_run(task, formatter, params, **fields)


def _config_of_run(path: pathlib.Path) -> dict[str, Any] | None:
    """The resolved config of the run that `path` belongs to; None for other checkpoints."""
    # A work directory, its checkpoints folder, or one step in it.
    for folder in (path, *path.absolute().parents[:2]):
        file = folder / "config.json"
        if file.exists() and (folder / "checkpoints").is_dir():
            return json.loads(file.read_text())["config"]
    return None
