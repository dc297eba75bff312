"""What lies in a work directory besides checkpoints: is it what a run expects, and its config."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from vlm_jax.checkpoints import commit_marker
from vlm_jax.program import config as config_lib
from vlm_jax.program import metric_writer

CONFIG = "config.json"


def check(workdir: pathlib.Path) -> None:
    """Raises ConfigError where a file lies in the place of a folder of ours, or the reverse."""
    for name in ("", "checkpoints", "eval", "tensorboard"):
        if os.path.lexists(workdir / name) and not (workdir / name).is_dir():
            raise config_lib.ConfigError(
                f"{workdir / name} is not a folder, and a run needs one there: move it away, or "
                "choose another --workdir"
            )
    for name in (metric_writer.FILE, CONFIG):
        if (workdir / name).is_dir():
            raise config_lib.ConfigError(
                f"{workdir / name} is a folder, and a run writes a file there: move it away, or "
                "choose another --workdir"
            )


def write_config(workdir: pathlib.Path, meta: Mapping[str, Any]) -> None:
    """config.json, for people: what counts is the copy in every checkpoint."""
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(meta, indent=1, default=str)
    commit_marker.write_durably(epath.Path(workdir) / CONFIG, text)
