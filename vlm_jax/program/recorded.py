"""Recipes as runs recorded them: config.json of a work directory, or meta.json of a step.

python -m vlm_jax.main --config=RUN/config.json --workdir=RUN2
python -m vlm_jax.main --workdir=RUN --mode=evaluate
"""

from __future__ import annotations

import json
import pathlib
from typing import Any


def read(path: pathlib.Path) -> dict[str, Any]:
    """The recipe in a config.json or meta.json of ours.

    Raises:
      ValueError: it is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = values.get("config", values.get("meta", {}).get("config"))
        if "system" in config and "train" in config:
            return config
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(
        f"--config={path} is no recipe but the record of one, and not of a run of ours: give the "
        "Python file that the run was started with"
    )


def of_run(workdir: str) -> dict[str, Any]:
    """The recipe that the newest good checkpoint was trained with.

    Raises:
      CheckpointError: nothing good is there.
    """
    from vlm_jax import checkpoints  # imports jax

    return checkpoints.find(workdir).config
