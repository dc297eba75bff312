"""Checkpoints that are either complete and unchanged, or not used.

Orbax writes the arrays, in the background. Around it this module adds what orbax does not give:

    <workdir>/checkpoints/300/state/...      arrays (orbax, OCDBT)
                             /meta.json      config, versions, data position; names and shapes
                             /COMMIT.json    size and SHA-256 of every other file; written last

A step counts only if COMMIT.json is there and every file matches it. So a save that was cut off,
an empty folder that happens to be called 300, a truncated file and a flipped bit (orbax reads the
last one without complaint) are all passed over, newest first, each with one line on stderr.

The state is any pytree of arrays. It is stored flat, under its '/'-joined paths
("params/layers/attn/q/kernel", "opt_state/0/count"), and never pickled.

With several processes all of them see one file system; process 0 decides and writes the JSON.
`save` and `latest_good` are collective: every process calls them, in the same order. Tested on
local file systems; mount a bucket rather than naming it.
"""

import dataclasses
import errno
import functools
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

from vlm_jax import commit_marker

META = "meta.json"
_SPARE_BYTES = 1 << 20  # room for metadata files and the marker


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not fit what is asked of it."""


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where parameters start, laid over the random ones in this order.

    Attributes:
      run: a workdir, or one of its step folders, of an earlier run of ours.
      upstream: a published checkpoint, in the system's own format.
      random: regex of the parameter paths that may stay random after the two above.
    """

    run: str = ""
    upstream: str = ""
    random: str = ""


class Checkpointer:
    """Saves and restores the steps of one run under `<workdir>/checkpoints`.

    Args:
      workdir: folder of the run, shared by all processes; created when missing.
      keep_last: how many of the newest steps stay.
      milestone_every: steps divisible by this stay for ever; 0 keeps no milestones.
    """

    def __init__(self, workdir, keep_last: int = 3, milestone_every: int = 0):
        if keep_last < 1 or milestone_every < 0:
            raise ValueError(
                f"keep_last={keep_last} must be at least 1 and milestone_every={milestone_every} "
                "at least 0"
            )
        self.folder = epath.Path(workdir).expanduser().absolute() / "checkpoints"
        self._keep_last = keep_last
        self._milestone_every = milestone_every
        self._good: set[int] = set()  # verified, or written by this object
        self._rejected: set[int] = set()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Any, meta: dict) -> bool:
        """Starts saving; returns once the arrays are off the device. Collective.

        Waits for the previous save first, and raises its error if it failed.

        Args:
          step: number of updates that made this state.
          state: pytree of arrays.
          meta: JSON-able; handed back by `restore`.

        Returns:
          False if this object has saved or restored this step already: then nothing is written.

        Raises:
          CheckpointError: the step exists and was not resumed from, or the disk is full. Earlier
            steps stay as they are.
        """
        self.wait()
        step = int(step)
        if step in self._good:
            return False
        arrays = _flatten(state)
        num_bytes = sum(np.dtype(a.dtype).itemsize * a.size for a in arrays.values())
        text = json.dumps({"step": step, "meta": meta, "leaves": _describe(arrays)}, indent=1)
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
        """Newest step whose marker exists and whose files match it; None if there is none.

        Collective. Process 0 reads every file of the candidates and says on stderr, one line
        each, which steps it passes over and why.
        """
        found = -1
        if jax.process_index() == 0:
            found = self._find_latest()
        found = _from_first(found)
        if found < 0:
            return None
        self._good.add(found)
        return found

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
        folder = self._step_folder(step)
        if step not in self._good:
            _require_good(folder)
        saved = _read_meta(folder)
        abstract = _flatten(abstract_state)
        _require_same(folder, saved["leaves"], _describe(abstract))
        arrays = _read_arrays(folder, abstract)
        self._good.add(step)
        leaves = [arrays[name] for name in abstract]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), saved["meta"]

    # ---- on process 0 -----------------------------------------------------------------------

    def _find_latest(self) -> int:
        for step in sorted(_steps(self.folder), reverse=True):
            reason = commit_marker.why_bad(self._step_folder(step))
            if not reason:
                return step
            self._rejected.add(step)
            _say(f"checkpoint of step {step} is not used: {reason}")
        return -1

    def _prepare(self, step: int, num_bytes: int) -> str:
        """Makes an empty folder for the step; returns what stands in the way, or ""."""
        folder = self._step_folder(step)
        try:
            if folder.exists():
                if step not in self._rejected and not commit_marker.why_bad(folder):
                    return (
                        f"step {step} is already saved in {folder}, by another run: resume from "
                        "it or choose another workdir"
                    )
                self._move_aside(step)
            folder.mkdir(parents=True)
            free = _free_bytes(folder)
            if free is not None and free < num_bytes + _SPARE_BYTES:
                folder.rmdir()
                return _disk_full(folder, free, num_bytes)
        except OSError as error:
            if _is_disk_full(error):
                return _disk_full(folder, _free_bytes(self.folder), num_bytes)
            return f"cannot save step {step} in {folder}: {error}"
        return ""

    def _move_aside(self, step: int) -> None:
        folder = self._step_folder(step)
        if _is_cut_off(folder):
            folder.rmtree()
            return
        taken = {path.name for path in self.folder.iterdir()}
        n = next(n for n in range(len(taken) + 1) if f"rejected-{step}-{n}" not in taken)
        folder.rename(self.folder / f"rejected-{step}-{n}")
        self._rejected.discard(step)

    def _finish(self, step: int, text: str, num_bytes: int) -> None:
        """Body of the background thread: orbax's end, the JSON, the marker, old steps."""
        folder = self._step_folder(step)
        try:
            with _quiet_orbax():
                self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                commit_marker.write_durably(folder / META, text)
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
        past = [s for s in _steps(self.folder) if s <= step and s not in self._rejected]
        committed = sorted(s for s in past if commit_marker.is_committed(self._step_folder(s)))
        for old in committed[: -self._keep_last]:
            if self._milestone_every and old % self._milestone_every == 0:
                continue
            commit_marker.revoke(self._step_folder(old))
            self._step_folder(old).rmtree()
        for other in _steps(self.folder):
            if other != step and _is_cut_off(self._step_folder(other)):
                self._step_folder(other).rmtree()

    def _failed(self, step: int, num_bytes: int, error: Exception) -> CheckpointError:
        """The error to raise for a failed save; removes what it left."""
        folder = self._step_folder(step)
        free = _free_bytes(self.folder)
        if jax.process_index() == 0 and not commit_marker.is_committed(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if _is_disk_full(error):
            return CheckpointError(_disk_full(folder, free, num_bytes))
        return CheckpointError(
            f"cannot save step {step} in {folder}: {commit_marker.one_line(error)}"
        )

    def _step_folder(self, step: int) -> epath.Path:
        return self.folder / str(step)


def load_params(path, abstract: Any = None, item: str = "params") -> Any:
    """Reads the parameters alone, for inference or to start another run from.

    Args:
      path: a workdir (its newest good step is taken) or one step folder.
      abstract: pytree of jax.ShapeDtypeStruct with shardings; other dtypes are cast. None reads
        every leaf as saved onto the first local device.
      item: part of the state to read, such as "ema".

    Returns:
      A pytree like `abstract`, or nested dicts with string keys.

    Raises:
      CheckpointError: nothing good is there, or names or shapes differ from `abstract`.
    """
    folder = _find_step(epath.Path(path).expanduser().absolute())
    prefix = item + "/"
    saved = {
        name: leaf for name, leaf in _read_meta(folder)["leaves"].items() if name.startswith(prefix)
    }
    if not saved:
        raise CheckpointError(f"{folder} holds no {item!r}")
    if abstract is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"], sharding=sharding)
            for name, leaf in saved.items()
        }
        return _nest(_read_arrays(folder, wanted), prefix)
    wanted = {prefix + name: leaf for name, leaf in _flatten(abstract).items()}
    _require_same(folder, saved, _describe(wanted), compare_dtypes=False)
    arrays = _read_arrays(folder, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def _find_step(path: epath.Path) -> epath.Path:
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    if commit_marker.is_committed(path) or (path.name.isdigit() and not folder.exists()):
        _require_good(path)
        return path
    steps = _steps(folder)
    for step in sorted(steps, reverse=True):
        reason = commit_marker.why_bad(folder / str(step))
        if not reason:
            return folder / str(step)
        _say(f"checkpoint of step {step} is not used: {reason}")
    raise CheckpointError(f"no good checkpoint in {folder} ({len(steps)} looked at)")


# ---- arrays ---------------------------------------------------------------------------------


def _flatten(tree: Any) -> dict[str, Any]:
    """{'/'-joined path: leaf}, in the tree's own order."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in flat:
            raise ValueError(f"two leaves of the state are called {name!r}")
        flat[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return flat


def _nest(arrays: dict[str, Any], prefix: str) -> dict:
    nested = {}
    for name, leaf in arrays.items():
        *parents, last = name.removeprefix(prefix).split("/")
        functools.reduce(lambda d, key: d.setdefault(key, {}), parents, nested)[last] = leaf
    return nested


def _describe(arrays: dict[str, Any]) -> dict[str, dict]:
    return {
        name: {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}
        for name, leaf in arrays.items()
    }


def _read_arrays(folder: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    if not (folder / "state").exists():
        raise CheckpointError(
            f"process {jax.process_index()} does not see {folder}: the workdir must be on a file "
            "system that all hosts share"
        )
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder / "state", args=args)


def _require_same(folder, saved: dict, wanted: dict, compare_dtypes: bool = True) -> None:
    """Raises CheckpointError naming every leaf (up to ten) that differs, with both shapes."""

    def show(leaf):
        return f"{leaf['dtype']}{leaf['shape']}" if leaf else "absent"

    def differs(a, b):
        return not (a and b) or a["shape"] != b["shape"] or (compare_dtypes and a != b)

    names = [name for name in {**saved, **wanted} if differs(saved.get(name), wanted.get(name))]
    if names:
        lines = [
            f"  {name}: checkpoint {show(saved.get(name))}, model {show(wanted.get(name))}"
            for name in names[:10]
        ]
        if len(names) > 10:
            lines.append(f"  and {len(names) - 10} more")
        raise CheckpointError(
            f"{folder} is of another model: {len(names)} of {len(wanted)} leaves differ.\n"
            + "\n".join(lines)
            + "\nUse the config it was saved with (meta.json beside it), or another workdir."
        )


# ---- files ----------------------------------------------------------------------------------


def _steps(folder: epath.Path) -> list[int]:
    if not folder.exists():
        return []
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]


def _is_cut_off(folder: epath.Path) -> bool:
    # Orbax renames this temporary folder to `state` at its end; before that nothing can be read.
    return any(path.name.startswith("state.orbax-checkpoint-tmp") for path in folder.iterdir())


def _require_good(folder: epath.Path) -> None:
    reason = commit_marker.why_bad(folder) if folder.exists() else f"{folder} does not exist"
    if reason:
        raise CheckpointError(f"not a good checkpoint: {reason}")


def _read_meta(folder: epath.Path) -> dict:
    return json.loads((folder / META).read_text())


def _free_bytes(folder: epath.Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free if commit_marker.is_local(folder) else None
    except OSError:
        return None


def _is_disk_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return getattr(error, "errno", None) in codes or any(os.strerror(c) in text for c in codes)


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
