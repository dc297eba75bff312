"""Reading checkpoints: which step to take, and its parameters without the rest of its state.

Used through `checkpoints`, which also writes them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from vlm_jax.checkpoints import commit_marker, leaves, step_folders


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not fit what is asked of it."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A good step on disk, as `find` returns it.

    Attributes:
      folder: of the step.
      number: updates that made it.
      meta: what was saved with it; "config" is the recipe.
      leaves: name -> shape and dtype.
    """

    folder: epath.Path
    number: int
    meta: dict
    leaves: dict

    @property
    def config(self) -> dict:
        """The recipe that this step was trained with.

        Raises:
          CheckpointError: none was saved with it.
        """
        if not isinstance(self.meta.get("config"), dict):
            raise CheckpointError(f"{self.folder} does not say how its run was configured")
        return self.meta["config"]

    @property
    def has_average(self) -> bool:
        """Whether the run kept a moving average of its parameters."""
        return any(name.startswith("ema/") for name in self.leaves)


def find(path) -> Step:
    """The newest good step of a workdir (or of its checkpoints folder), or the step `path`.

    Raises:
      CheckpointError: nothing good is there.
    """
    path = epath.Path(path).expanduser().absolute()
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    if commit_marker.is_committed(path) or (step_folders.is_step(path) and not folder.exists()):
        require_good(path)
        return _step(path)
    passed_over: set[int] = set()
    while (number := step_folders.newest(folder, passed_over)) >= 0:
        reason = why_not_finite(folder / str(number))
        if not reason:
            return _step(folder / str(number))
        step_folders.pass_over(number, reason, passed_over)
    raise CheckpointError(f"no good checkpoint in {folder} ({len(passed_over)} looked at)")


def load_params(path, abstract: Any = None, item: str = "params", *, averaged: bool = True) -> Any:
    """Reads the parameters alone, for inference or to start another run from.

    Args:
      path: a workdir (its newest good step is taken), one step folder, or a result of `find`.
      abstract: pytree of jax.ShapeDtypeStruct with shardings; other dtypes are cast. None reads
        every leaf as saved onto the first local device.
      item: part of the state to read, such as "ema".
      averaged: take the moving average where the run kept one (`optim.ema`), as evaluations do;
        False gives the raw parameters. Parameters that do not learn have no average.

    Returns:
      A pytree like `abstract`, or nested dicts with string keys.

    Raises:
      CheckpointError: nothing good is there, or names or shapes differ from `abstract`.
    """
    step = path if isinstance(path, Step) else find(path)
    prefix = item + "/"
    saved = {name: leaf for name, leaf in step.leaves.items() if name.startswith(prefix)}
    if not saved:
        raise CheckpointError(f"{step.folder} holds no {item!r}")
    if abstract is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"], sharding=sharding)
            for name, leaf in saved.items()
        }
    else:
        wanted = {prefix + name: leaf for name, leaf in leaves.flatten(abstract).items()}
        require_same(step.folder, saved, leaves.describe(wanted), compare_dtypes=False)
    sources = {}  # name of the parameter -> name of the leaf to read for it
    for name in wanted:
        average = name.replace(prefix, "ema/", 1)
        use = averaged and item == "params" and average in step.leaves
        sources[name] = average if use else name
    arrays = read_arrays(step.folder, {sources[name]: x for name, x in wanted.items()})
    found = {name: arrays[source] for name, source in sources.items()}
    if abstract is None:
        return nest(found, prefix)
    return jax.tree.unflatten(jax.tree.structure(abstract), list(found.values()))


def _step(folder: epath.Path) -> Step:
    saved = step_folders.read(folder)
    return Step(folder, saved["step"], saved["meta"], saved["leaves"])


# ---- arrays ---------------------------------------------------------------------------------


def nest(arrays: dict[str, Any], prefix: str) -> dict:
    """Nested dicts of the leaves whose names begin with `prefix`, which is cut off."""
    nested = {}
    for name, leaf in arrays.items():
        *parents, last = name.removeprefix(prefix).split("/")
        functools.reduce(lambda d, key: d.setdefault(key, {}), parents, nested)[last] = leaf
    return nested


def read_arrays(folder: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Some leaves of a step, onto the devices and in the dtypes of `wanted` (ShapeDtypeStructs)."""
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


def require_same(
    folder: epath.Path, saved: dict, wanted: dict, compare_dtypes: bool = True
) -> None:
    """Raises CheckpointError naming every leaf (up to ten) that differs, with both shapes."""
    if lines := leaves.differences(saved, wanted, compare_dtypes):
        raise CheckpointError(
            f"{folder} is of another model: "
            + "\n".join(lines)
            + "\nUse the config it was saved with (meta.json beside it), or another workdir."
        )


def why_not_finite(folder: epath.Path) -> str:
    """Looks at the values of a step that was saved before this was noted at each save."""
    saved = step_folders.read(folder)
    if "nonfinite" in saved:
        return ""  # `step_folders.why_unusable` has looked at it
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for name, leaf in saved["leaves"].items():  # one at a time: the state may be large
        wanted = jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"], sharding=sharding)
        if leaves.nonfinite(read_arrays(folder, {name: wanted})):
            return f"{folder} holds values that are not finite, in {name}"
    return ""


def require_good(folder: epath.Path) -> None:
    """Raises CheckpointError unless the step can be used."""
    if reason := step_folders.why_unusable(folder) or why_not_finite(folder):
        raise CheckpointError(f"not a good checkpoint: {reason}")
