"""Where a run can be watched besides its folder: TensorBoard and Weights & Biases.

Both get the recipe, the scalars, and of every evaluation its pictures (*.png) and tables (*.md).
"""

from __future__ import annotations

import html
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from vlm_jax.data import images, records
from vlm_jax.program import config as config_lib


class Tracker(Protocol):
    """What `metric_writer.MetricWriter` writes to besides its own file."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""

    def folder(self, step: int, name: str, folder: pathlib.Path) -> None:
        """The pictures and tables in a folder, as NAME/<name of the file without suffix>."""

    def close(self) -> None:
        """Ends it."""


def tensorboard(folder: pathlib.Path, config: Mapping[str, Any], start_step: int) -> Tracker | None:
    """Event files in `folder`; None, said on stderr, where tensorboardX is not installed."""
    try:
        import tensorboardX
    except ImportError:
        print("metrics: no TensorBoard files, tensorboardX is not installed", file=sys.stderr)
        return None
    # purge_step hides what an interrupted run wrote after the step that is resumed from.
    purge_step = start_step + 1 if start_step else None
    events = tensorboardX.SummaryWriter(logdir=str(folder), purge_step=purge_step)
    if config:
        shown = json.dumps(config, indent=1, default=str)
        events.add_text("config", f"```\n{shown}\n```", start_step)
    return _TensorBoard(events)


def wandb(workdir: pathlib.Path, config: Mapping[str, Any], project: str) -> Tracker:
    """A page of Weights & Biases; a resumed run continues its own.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import wandb as library
    except ImportError:
        raise config_lib.ConfigError(
            f"train.wandb={project!r} is asked for, but wandb is not installed: install it, or "
            "set train.wandb=''"
        ) from None
    # The id stays with the workdir, so that a resumed run continues its own page.
    note = workdir / "wandb_id.txt"
    run = library.init(
        project=project,
        dir=str(workdir),
        id=note.read_text().strip() if note.exists() else None,
        resume="allow",
        config=dict(config),
        allow_val_change=True,  # a resumed run may have another recipe
    )
    note.write_text(run.id)
    return _Wandb(library, run)


class _TensorBoard:
    def __init__(self, events):
        self._events = events

    def scalars(self, step, values):
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def folder(self, step, name, folder):
        for path, tag in _found(folder, name, "png"):
            self._events.add_image(tag, images.decode(path), step, dataformats="HWC")
        for path, tag in _found(folder, name, "md"):
            self._events.add_text(tag, path.read_text(**records.TEXT), step)
        self._events.flush()

    def close(self):
        self._events.close()


class _Wandb:
    def __init__(self, library, run):
        self._library, self._run = library, run

    def scalars(self, step, values):
        self._run.log(dict(values), step=step)

    def folder(self, step, name, folder):
        shown = {tag: self._library.Image(str(path)) for path, tag in _found(folder, name, "png")}
        for path, tag in _found(folder, name, "md"):
            text = html.escape(path.read_text(**records.TEXT))
            shown[tag] = self._library.Html(f"<pre>{text}</pre>")
        if shown:
            self._run.log(shown, step=step)

    def close(self):
        self._run.finish()


def _found(folder, name, suffix):
    """(path, name that it is shown under) of the files of a suffix."""
    return [(path, f"{name}/{path.stem}") for path in sorted(folder.glob(f"*.{suffix}"))]
