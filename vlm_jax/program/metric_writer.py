"""Scalars of a run: metrics.jsonl always, TensorBoard and Weights & Biases when they are there.

metrics.jsonl has one JSON object per line, {"step": 10, "train/loss": 5.1, ...}, flushed at once.
It is only ever appended to, or cut back: a run that resumes at step s cuts the lines after s first,
so no step is told twice and the file reads as if the run had never stopped. Lines that are not
ours stay where they are and are passed over. Only process 0 writes.
"""

import contextlib
import json
import math
import numbers
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from vlm_jax.program import trackers

FILE = "metrics.jsonl"


class MetricWriter:
    """Writes scalars of one run, and shows pictures and tables where it can be watched.

    Args:
      workdir: folder of the run; created when missing.
      start_step: updates already made; later lines of an interrupted run are dropped.
      tensorboard: write event files under `<workdir>/tensorboard`, when tensorboardX is installed.
      wandb: project name for Weights & Biases; "" is off.
      config: the recipe, for both of them; JSON-like.

    Raises:
      ConfigError: `wandb` is asked for and not installed.
    """

    def __init__(
        self,
        workdir,
        start_step: int = 0,
        tensorboard: bool = True,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self._file, self._trackers = None, []
        if jax.process_index() != 0:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if wandb:
            self._trackers.append(trackers.wandb(workdir, config or {}, wandb))
        _cut(workdir / FILE, start_step)
        self._file = open(workdir / FILE, "a", encoding="utf-8")
        if tensorboard:
            events = trackers.tensorboard(workdir / "tensorboard", config or {}, start_step)
            self._trackers += [events] if events else []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line.

        Args:
          step: number of updates made.
          values: numbers on the host. NaN and infinities become null, which JSON has a word for.

        Raises:
          TypeError: a value is not a host number; fetching a device array here would stall it.
        """
        for name, value in values.items():
            if not isinstance(value, numbers.Real):
                raise TypeError(
                    f"metric {name!r} is a {type(value).__name__}, not a number: use "
                    "jax.device_get and float first"
                )
        if self._file is None:
            return
        scalars = {name: _plain(value) for name, value in values.items()}
        finite = {
            name: value if value is None or math.isfinite(value) else None
            for name, value in scalars.items()
        }
        with self._naming_the_file():
            self._file.write(json.dumps({"step": int(step), **finite}) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.scalars(int(step), scalars)

    def show(self, step: int, name: str, folder: pathlib.Path) -> None:
        """Shows the pictures and tables of a folder as `name`; they stay where they are."""
        for tracker in self._trackers:
            tracker.folder(int(step), name, folder)

    def sync(self) -> None:
        """Returns when all lines have reached the disk, not only the operating system."""
        if self._file:
            with self._naming_the_file():
                os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _naming_the_file(self):
        try:
            yield
        except OSError as error:  # a full disk; Python does not say which file
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def close(self) -> None:
        """Closes the files. May be called twice."""
        if self._file:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()
        self._file, self._trackers = None, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read(workdir) -> Iterator[dict]:
    """The lines of a run's metrics.jsonl; those that are not ours or were cut off are left out."""
    for _, entry in _lines(pathlib.Path(workdir) / FILE):
        if entry is not None:
            yield entry


def _lines(path: pathlib.Path) -> Iterator[tuple[bytes, dict | None]]:
    """Every line as it is, with what it says; None for a line that is not ours."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                entry = json.loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                entry = None
            ours = isinstance(entry, dict) and type(entry.get("step")) is int
            yield line, entry if ours else None


def _cut(path: pathlib.Path, last_step: int) -> None:
    """Keeps the whole lines up to `last_step`, and what is not ours among them."""
    if not path.exists():
        return
    kept, cut, in_order, keeps = 0, 0, True, True
    for line, entry in _lines(path):
        keeps = line.endswith(b"\n") and (keeps if entry is None else entry["step"] <= last_step)
        in_order = in_order and not (keeps and cut)
        kept, cut = kept + keeps * len(line), cut + (not keeps) * len(line)
    if cut and in_order:
        os.truncate(path, kept)
    elif cut:  # lines of two runs in one file
        _rewrite(path, last_step)


def _rewrite(path: pathlib.Path, last_step: int) -> None:
    temporary = path.with_suffix(".jsonl.tmp")
    with open(temporary, "wb") as file:
        for line, entry in _lines(path):
            if entry is not None and entry["step"] <= last_step and line.endswith(b"\n"):
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _plain(value):
    # numpy scalars are not JSON; bool and int stay what they are.
    return value if isinstance(value, (bool, int)) else float(value)
