"""Checkpoints that are either complete and unchanged, or not used.

Orbax writes the arrays, in the background. Around it this module adds what orbax does not give:
meta.json and a commit marker (see step_folders.py). A step counts only if the marker is there,
every file matches it, and all values are finite. So a save that was cut off, an empty or renamed
folder, a truncated file, a flipped bit (orbax reads the last one without complaint) and parameters
that are NaN are all passed over, newest first, each with one line on stderr.

The state is any pytree of arrays. It is stored flat (see leaves.py) and never pickled.

With several processes all of them see one file system; process 0 decides and writes the JSON.
`save` and `latest_good` are collective: every process calls them, in the same order. Tested on
local file systems; mount a bucket rather than naming it.
"""

import dataclasses
import json
import os
import shutil
import sys
import threading
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vlm_jax.checkpoints import commit_marker, leaves, step_folders
from vlm_jax.checkpoints import reading as checkpoint_reading
from vlm_jax.machines import disk

_SPARE_BYTES = 1 << 20  # room for metadata files and the marker


# Reading has a file of its own; this is the door to both.
CheckpointError = checkpoint_reading.CheckpointError
Step = checkpoint_reading.Step
find = checkpoint_reading.find
load_params = checkpoint_reading.load_params
require_same = checkpoint_reading.require_same
_read_arrays = checkpoint_reading.read_arrays
_nest = checkpoint_reading.nest


class NotFiniteError(CheckpointError):
    """The state to be saved holds NaN or infinity; nothing was written."""


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where parameters start. What `run` has comes from there, the rest from `upstream`.

    Attributes:
      run: a workdir, or one of its step folders, of an earlier run of ours.
      upstream: a published checkpoint, in the system's own format.
      random: regex of the parameter paths that may stay random after the two above.
      averaged: take the moving average of `run` where it kept one; False takes the raw parameters.
        The same choice when a work directory is evaluated.
      insist: continue or evaluate a run although model, task or formatter are not those that it
        was trained with; see `resume.py`.
    """

    run: str = ""
    upstream: str = ""
    random: str = ""
    averaged: bool = True
    insist: bool = False


class Checkpointer:
    """Saves and restores the steps of one run under `<workdir>/checkpoints`.

    Args:
      workdir: folder of the run, shared by all processes.
      keep_last: how many of the newest steps stay.
      milestone_every: steps divisible by this stay for ever; 0 keeps no milestones.
      create: make the folder now; False leaves that to the first save.
    """

    def __init__(
        self, workdir, keep_last: int = 3, milestone_every: int = 0, *, create: bool = True
    ):
        if keep_last < 1 or milestone_every < 0:
            raise ValueError(
                f"keep_last={keep_last} must be at least 1 and milestone_every={milestone_every} "
                "at least 0"
            )
        if reason := step_folders.why_not_writable(workdir):
            raise CheckpointError(f"the workdir {workdir} cannot hold checkpoints: {reason}")
        self.folder = epath.Path(workdir).expanduser().absolute() / "checkpoints"
        self._keep_last = keep_last
        self._milestone_every = milestone_every
        self._good: set[int] = set()  # verified, or written by this object
        self._rejected: set[int] = set()  # bad, and told so
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        if create and jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Any, meta: dict, *, must_be_finite: bool = False) -> bool:
        """Starts saving; returns once the arrays are off the device. Collective.

        Waits for the previous save first, and raises its error if it failed.

        Args:
          step: number of updates that made this state.
          state: pytree of arrays.
          meta: JSON-able; handed back by `restore`.
          must_be_finite: refuse NaN and infinities. Without it they are saved, and passed over
            when a run is continued or loaded.

        Returns:
          False if this object has saved or restored this step already: then nothing is written.

        Raises:
          CheckpointError: the step exists and was not resumed from, or the disk is full. Earlier
            steps stay as they are.
          NotFiniteError: see `must_be_finite`.
        """
        self.wait()
        step = int(step)
        if step in self._good:
            return False
        arrays = leaves.flatten(state)
        num_bytes = sum(np.dtype(a.dtype).itemsize * a.size for a in arrays.values())
        bad = leaves.nonfinite(arrays)
        if bad and must_be_finite:
            raise NotFiniteError(
                f"step {step} is not saved: {len(bad)} of {len(arrays)} leaves hold NaN or "
                f"infinity, among them {', '.join(bad[:3])}"
            )
        saved = {"step": step, "meta": meta, "nonfinite": bad, "leaves": leaves.describe(arrays)}
        text = json.dumps(saved, indent=1)
        problem = self._prepare(step, num_bytes) if jax.process_index() == 0 else ""
        if _from_first(bool(problem)):
            raise CheckpointError(problem or f"process 0 cannot save step {step}; see its message")
        try:
            self._orbax.save(self._step_folder(step) / "state", args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise self._failed(step, num_bytes, error) from error
        # Not a daemon: an interpreter that exits normally waits for the marker.
        self._thread = threading.Thread(
            target=self._finish, args=(step, text, num_bytes), name=f"commit-{step}"
        )
        self._thread.start()
        return True

    def check(self) -> None:
        """Raises the error of a save that failed in the background, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Waits until the save under way is committed; raises its error if it failed."""
        if self._thread is not None:
            self._thread.join()  # may be interrupted by Ctrl-C, and called again
            self._thread = None
        self.check()

    def close(self) -> None:
        """Waits like `wait`, then releases orbax's threads. May be called twice."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.close()
        except CheckpointError as failure:
            if kind is None:
                raise
            _say(str(failure))  # the error on its way out is the one to report

    def latest_good(self) -> int | None:
        """Newest step that is complete, unchanged and finite; None if there is none.

        Collective. Process 0 reads every file of the candidates and says on stderr, one line
        each, which steps it passes over and why.
        """
        while True:
            found = -1
            if jax.process_index() == 0:
                found = step_folders.newest(self.folder, self._rejected)
            found = _from_first(found)
            if found < 0:
                return None
            reason = checkpoint_reading.why_not_finite(self._step_folder(found))
            if not reason:
                self._good.add(found)
                return found
            step_folders.pass_over(found, reason, self._rejected)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict]:
        """Reads a step into the shapes and onto the devices of `abstract_state`.

        Args:
          step: as given by `latest_good`; another step is verified first.
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings, or of arrays. The mesh
            may be another one than the step was saved from.

        Returns:
          (state, meta).

        Raises:
          CheckpointError: the step is not good, or its leaves have other names, shapes or dtypes.
        """
        saved = self.describe(step)
        abstract = leaves.flatten(abstract_state)
        checkpoint_reading.require_same(
            self._step_folder(step), saved["leaves"], leaves.describe(abstract)
        )
        arrays = self.read(step, abstract)
        found = [arrays[name] for name in abstract]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), found), saved["meta"]

    def describe(self, step: int) -> dict:
        """What meta.json of a step says: "step", "meta", and "leaves", name -> shape and dtype.

        Raises:
          CheckpointError: the step is not good.
        """
        if step not in self._good:
            checkpoint_reading.require_good(self._step_folder(step))
            self._good.add(step)
        return step_folders.read(self._step_folder(step))

    def read(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        """Some leaves of a good step, by their names in it.

        Args:
          step: as given by `latest_good`.
          wanted: name -> jax.ShapeDtypeStruct with a sharding; another dtype is cast to.
        """
        return checkpoint_reading.read_arrays(self._step_folder(step), wanted)

    def passed_over(self) -> list[int]:
        """Steps that `latest_good` could not use; on process 0."""
        return sorted(self._rejected)

    def newest_used(self) -> int:
        """The newest step that this object saved or read; 0 if there is none."""
        return max(self._good, default=0)

    # ---- on process 0 -----------------------------------------------------------------------

    def _prepare(self, step: int, num_bytes: int) -> str:
        """Makes an empty folder for the step; returns what stands in the way, or ""."""
        folder = self._step_folder(step)
        try:
            if os.path.lexists(folder):
                if step not in self._rejected and not step_folders.why_unusable(folder):
                    return (
                        f"step {step} is already saved in {folder}, by another run: resume from "
                        "it or choose another workdir"
                    )
                step_folders.move_aside(folder)
                self._rejected.discard(step)
            folder.mkdir(parents=True)
            free = _free_bytes(folder)
            if free is not None and free < num_bytes + _SPARE_BYTES:
                folder.rmdir()
                return _disk_full(folder, free, num_bytes)
        except OSError as error:
            if disk.is_full(error):
                return _disk_full(folder, _free_bytes(self.folder), num_bytes)
            return f"cannot save step {step} in {folder}: {error}"
        return ""

    def _finish(self, step: int, text: str, num_bytes: int) -> None:
        """Body of the background thread: orbax's end, the JSON, the marker, old steps."""
        folder = self._step_folder(step)
        try:
            with _quiet_orbax():
                self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                commit_marker.write_durably(folder / step_folders.META, text)
                commit_marker.commit(folder)
                self._rejected.discard(step)
            self._good.add(step)
        except Exception as error:
            self._error = self._failed(step, num_bytes, error)
            self._error.__cause__ = error
            return
        if jax.process_index() == 0:
            try:
                self._remove_old(step)
            except OSError as error:
                _say(f"old checkpoints stay in {self.folder}: {error}")

    def _remove_old(self, step: int) -> None:
        # Later steps are not this run's past, and rejected ones must not push out good ones.
        past = [s for s in step_folders.steps(self.folder) if s <= step and s not in self._rejected]
        committed = [s for s in past if commit_marker.is_committed(self._step_folder(s))]
        for old in committed[: -self._keep_last]:
            if self._milestone_every and old % self._milestone_every == 0:
                continue
            commit_marker.revoke(self._step_folder(old))
            self._step_folder(old).rmtree()
        for other in step_folders.steps(self.folder):
            if other != step and step_folders.is_cut_off(self._step_folder(other)):
                self._step_folder(other).rmtree()

    def _failed(self, step: int, num_bytes: int, error: Exception) -> CheckpointError:
        """The error to raise for a failed save; removes what it left."""
        folder = self._step_folder(step)
        free = _free_bytes(self.folder)
        if jax.process_index() == 0 and not commit_marker.is_committed(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if disk.is_full(error):
            return CheckpointError(_disk_full(folder, free, num_bytes))
        return CheckpointError(
            f"cannot save step {step} in {folder}: {commit_marker.one_line(error)}"
        )

    def _step_folder(self, step: int) -> epath.Path:
        return self.folder / str(step)


def _free_bytes(folder: epath.Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free if commit_marker.is_local(folder) else None
    except OSError:
        return None


def _disk_full(folder: epath.Path, free: int | None, num_bytes: int) -> str:
    free_text = "an unknown number of" if free is None else f"{free:,}"
    return (
        f"the disk is full: {folder} needs {num_bytes + _SPARE_BYTES:,} bytes and {free_text} "
        "bytes are free. The checkpoints already there are untouched: make room, or keep fewer, "
        "and run the same command again to resume."
    )


# ---- small things ---------------------------------------------------------------------------


def _from_first(value: int) -> int:
    """The value of process 0, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class _quiet_orbax:
    """Drops the traceback orbax logs for a failed save: the error is raised in full by us."""

    def __enter__(self):
        logging.get_absl_logger().addFilter(self._keep)

    def __exit__(self, *_):
        logging.get_absl_logger().removeFilter(self._keep)

    @staticmethod
    def _keep(record):
        return "Handler Commit operations" not in str(record.msg)


def _say(line: str) -> None:
    print(f"checkpoints: {line}", file=sys.stderr, flush=True)
