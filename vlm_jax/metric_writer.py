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
import sys
from collections.abc import Iterator, Mapping

import jax

from vlm_jax import config as config_lib

FILE = "metrics.jsonl"


class MetricWriter:
    """Writes scalars of one run.

    Args:
      workdir: folder of the run; created when missing.
      start_step: updates already made; later lines of an interrupted run are dropped.
      tensorboard: write event files under `<workdir>/tensorboard`, when tensorboardX is installed.
      wandb: project name for Weights & Biases; "" is off.

    Raises:
      ConfigError: `wandb` is asked for and not installed.
    """

    def __init__(self, workdir, start_step: int = 0, tensorboard: bool = True, wandb: str = ""):
        self._file = self._events = self._wandb = None
        if jax.process_index() != 0:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if wandb:
            self._wandb = _start_wandb(workdir, wandb)
        _cut(workdir / FILE, start_step)
        self._file = open(workdir / FILE, "a", encoding="utf-8")
        if tensorboard:
            self._events = _start_tensorboard(workdir / "tensorboard", start_step)

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
        if self._events:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, int(step))
            self._events.flush()
        if self._wandb:
            self._wandb.log(scalars, step=int(step))

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
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()
        self._file = self._events = self._wandb = None

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


def _start_tensorboard(folder: pathlib.Path, start_step: int):
    try:
        import tensorboardX
    except ImportError:
        print("metrics: no TensorBoard files, tensorboardX is not installed", file=sys.stderr)
        return None
    # purge_step hides what an interrupted run wrote after the step that is resumed from.
    return tensorboardX.SummaryWriter(
        logdir=str(folder), purge_step=start_step + 1 if start_step else None
    )


def _start_wandb(workdir: pathlib.Path, project: str):
    try:
        import wandb
    except ImportError:
        raise config_lib.ConfigError(
            f"train.wandb={project!r} is asked for, but wandb is not installed: install it, or "
            "set train.wandb=''"
        ) from None
    # The id stays with the workdir, so that a resumed run continues its own page.
    note = workdir / "wandb_id.txt"
    run_id = note.read_text().strip() if note.exists() else None
    run = wandb.init(project=project, dir=str(workdir), id=run_id, resume="allow")
    note.write_text(run.id)
    return run
