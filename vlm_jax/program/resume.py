"""Continuing a run: what has changed in its recipe since the checkpoint, and what that means.

A change is of one of three kinds:

- What the parameters mean: `system`, `model`, `task`, `formatter`, or the content of a file that
  one of these names (a tokenizer). Refused, unless `init.insist` is set or the change changes
  nothing: a default written out, another compute dtype, the same file elsewhere, a formatter that
  makes the same rows.
- What is trained on and how: data, batch size, learning rates, seed. Named, and done. With another
  batch size the data go on at the next row, so no record is skipped or read twice.
- What the optimizer keeps: clipping, decay, averaging, the dtype of moments, which parameters
  learn. Moments are found again by their parameter's name; what is missing starts fresh, and is
  named.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import checkpoints
from vlm_jax.checkpoints import leaves
from vlm_jax.program import config as config_lib

_MEANING = ("system", "model", "task", "formatter")
# Fields that say how the same function is computed.
_HOW = re.compile(r"(^|[._])(dtype|remat|loss_chunk)$")
# Fields that bound what is computed, or weigh losses.
_LIMIT = re.compile(r"(^|[._])(max_tokens|resolution|commitment_cost)$")
_UNSET = "(not set)"
_OPTIMIZER = ("opt_state/", "ema/")  # the leaves of a state that a change may add and remove
_WHOLE_FILE = 64 << 20  # longer files are told apart by their size, beginning and end


# ---- recipes --------------------------------------------------------------------------------


def changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{"optim.lr": (old value, new value)} of two configs, as nested dicts of JSON-able values."""
    old, new = _flat(old), _flat(new)
    return {
        key: (old.get(key, _UNSET), new.get(key, _UNSET))
        for key in sorted({**old, **new})
        if old.get(key, _UNSET) != new.get(key, _UNSET)
    }


def show(changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """A line per change."""

    def short(value):
        text = value if value == _UNSET else repr(value)
        return text if len(text) <= 100 else text[:100] + " ..."

    return [f"{key}: {short(old)} -> {short(new)}" for key, (old, new) in changed.items()]


def changed_meaning(
    saved: Mapping[str, Any],
    meta: Mapping[str, Any],
    make: Callable[[Mapping[str, Any]], tuple[Any, Any]],
    rows_of: Callable[[Any], Iterable[Mapping[str, Any]]],
) -> dict[str, tuple[Any, Any]]:
    """The changes between two recipes that make something else of the same parameters.

    Args:
      saved, meta: "config" and, in newer checkpoints, "files" (see `files_of`) of the checkpoint
        and of this run.
      make: config -> (task, formatter).
      rows_of: formatter -> some batches of this run's data, to see whether it makes other rows.
    """
    old_files, new_files = saved.get("files", {}), meta.get("files", {})
    new = meta["config"]
    old = copy.deepcopy(saved["config"])
    for key, (_, value) in changes(old, new).items():
        same_file = key in old_files and old_files[key] == new_files.get(key)
        if same_file or (key.startswith(_MEANING) and _HOW.search(key)):
            _set(old, key, value)
    other = {
        f"{key} (content)": (f"sha256 {old_files[key][:12]}", f"sha256 {new_files[key][:12]}")
        for key in old_files
        if key in new_files and old_files[key] != new_files[key]
    }
    changed = {
        key: both for key, both in changes(old, new).items() if key.split(".")[0] in _MEANING
    }
    if not changed:
        return other
    try:
        (old_task, old_formatter), (new_task, new_formatter) = make(old), make(new)
    except Exception:  # a field that is no more, a file that is gone: then the words count
        return changed | other
    same = set()
    if _equal(old_task, new_task):
        same |= {"model", "task"}
    if _equal(old_formatter, new_formatter) or _same_rows(rows_of, old_formatter, new_formatter):
        same |= {"formatter"}
    return {key: both for key, both in changed.items() if key.split(".")[0] not in same} | other


def changed_function(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    make: Callable[[Mapping[str, Any]], tuple[Any, Any]],
) -> dict[str, tuple[Any, Any]]:
    """The changes of `model` under which parameters of the same shapes compute something else.

    Nothing where shapes differ or the systems do: then laying the parameters says so.

    Args:
      theirs, ours: configs; of `theirs` only the model counts.
      make: config -> (task, formatter).
    """
    mixed = {**copy.deepcopy(dict(ours)), "model": copy.deepcopy(theirs.get("model", {}))}
    for key, (_, value) in changes({"model": mixed["model"]}, {"model": ours["model"]}).items():
        if _HOW.search(key) or _LIMIT.search(key):
            _set(mixed, key, value)
    changed = changes({"model": mixed["model"]}, {"model": ours["model"]})
    if not changed:
        return {}
    try:
        tasks = make(mixed)[0], make(ours)[0]
        a, b = (
            leaves.describe(leaves.flatten(jax.eval_shape(task.init, jax.random.key(0))))
            for task in tasks
        )
    except Exception:  # of another system, or sizes that do not fit
        return {}
    return {} if a != b or _equal(*tasks) else changed


def refuse(changed: Mapping[str, tuple[Any, Any]], what: str, remedy: str) -> None:
    """Raises ConfigError when something is in `changed`, with both values of each."""
    if changed:
        lines = "\n".join(f"  {line}" for line in show(changed))
        raise config_lib.ConfigError(
            f"the recipe is not the one of {what} (there -> here):\n{lines}\n{remedy} If it is "
            "meant, insist: --config.init.insist=True"
        )


def files_of(sections: Mapping[str, Any]) -> dict[str, str]:
    """{"task.tokenizer": sha256} of every file or folder that these sections name."""
    found = {}
    for key, value in _flat(sections).items():
        if not isinstance(value, str) or not value or key.endswith("preset"):
            continue
        path = pathlib.Path(value).expanduser()
        try:
            if path.exists():
                found[key] = _digest(path)
        except (OSError, ValueError):  # not a path, or one that must not be read
            continue
    return found


def rows_seen(saved: Mapping[str, Any], step: int, batch_size: int) -> int:
    """Rows of the data that the first `step` updates took, from a checkpoint's meta.

    Older checkpoints have only their recipe to tell; without one it is `batch_size` a step.
    """
    train = saved.get("config", {}).get("train", {})
    return int(saved.get("data", {}).get("rows", step * train.get("batch_size", batch_size)))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping):
        flat: dict[str, Any] = {}
        for key, value in values.items():
            flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    # As JSON gives it back: tuples are lists.
    return {prefix: json.loads(json.dumps(config_lib.plain(values), default=str))}


def _set(values: dict, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            return
    if value == _UNSET:
        values.pop(last, None)
    else:
        values[last] = value


def _equal(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except (ValueError, TypeError):  # arrays in them
        return False


def _same_rows(rows_of: Callable[[Any], Iterable[Mapping[str, Any]]], a: Any, b: Any) -> bool:
    try:
        pairs = list(zip(rows_of(a), rows_of(b), strict=True))
    except Exception:  # one of them cannot read these data
        return False
    return bool(pairs) and all(
        x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x) for x, y in pairs
    )


def _digest(path: pathlib.Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        name = str(file.relative_to(path)) if file != path else ""
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with open(file, "rb") as stream:
            if size <= _WHOLE_FILE:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            digest.update(stream.read(1 << 20))
            stream.seek(-(1 << 20), os.SEEK_END)
            digest.update(stream.read())
    return digest.hexdigest()


# ---- state ----------------------------------------------------------------------------------


def restore(
    saver: checkpoints.Checkpointer,
    step: int,
    target: Mapping[str, Any],
    begin: Callable[[Any], Mapping[str, Any]],
) -> tuple[Any, list[str]]:
    """The state of a good step, and what of the optimizer is not as it was, a line each.

    Args:
      saver, step: see `Checkpointer.latest_good`.
      target: the state as jax.ShapeDtypeStruct with shardings: "step", "params", "opt_state" and,
        with averaging, "ema".
      begin: params -> a fresh "opt_state" and "ema", for what the checkpoint has not. Jittable.

    Raises:
      CheckpointError: its parameters have other names, shapes or dtypes.
    """
    saved, wanted = saver.describe(step)["leaves"], leaves.flatten(target)
    require_same_parameters(saver, step, target)
    sources = _sources(saved, wanted)
    arrays = saver.read(step, {source: wanted[name] for name, source in sources.items()})
    flat: dict[str, Any] = {}
    used: set[str] = set()
    for name, source in sources.items():
        # Two counters may come from one; the update donates its buffers, so they must be two.
        flat[name] = jnp.copy(arrays[source]) if source in used else arrays[source]
        used.add(source)
    fresh = [name for name in wanted if name not in sources]
    if fresh:
        params = jax.tree.unflatten(
            jax.tree.structure(target["params"]),
            [flat[f"params/{name}"] for name in leaves.flatten(target["params"])],
        )
        start = jax.jit(
            lambda params: {name: leaves.flatten(begin(params))[name] for name in fresh},
            out_shardings={name: wanted[name].sharding for name in fresh},
        )
        flat |= start(params)
    state = jax.tree.unflatten(jax.tree.structure(target), [flat[name] for name in wanted])
    used |= {name for name in saved if not name.startswith(_OPTIMIZER)}
    dropped = [name for name in saved if name not in used]
    return state, _notes(step, wanted, saved, sources, fresh, dropped)


def require_same_parameters(
    saver: checkpoints.Checkpointer,
    step: int,
    state: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
) -> None:
    """Raises CheckpointError unless all but the optimizer's part is as in `state` (shapes do).

    It names the leaves, and the keys of `config` (that of this run) that may be why.
    """

    def kept(named):
        return {name: leaf for name, leaf in named.items() if not name.startswith(_OPTIMIZER)}

    described, folder = saver.describe(step), saver.folder / str(step)
    saved, wanted = kept(described["leaves"]), leaves.describe(kept(leaves.flatten(state)))
    try:
        checkpoints.require_same(folder, saved, wanted)
    except checkpoints.CheckpointError as error:
        if config is None:
            raise
        keys = changes(described["meta"].get("config", {}), config)
        keys = {key: both for key, both in keys.items() if key.startswith(_MEANING)}
        lines = [f"In the recipe (there -> here): {line}" for line in show(keys)]
        raise checkpoints.CheckpointError("\n".join([str(error), *lines])) from None


def _sources(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """Which leaf of the checkpoint every wanted leaf is; those that it has not are left out.

    The place of Adam in the chain of transformations depends on what else is in it, so places do
    not count: "opt_state/1/mu/embed/table" is "opt_state/0/mu/embed/table".
    """
    by_meaning: dict[str, list[str]] = {}
    for name in saved:
        by_meaning.setdefault(_meaning(name), []).append(name)
    turn: dict[str, int] = {}
    sources = {}
    for name, leaf in wanted.items():
        same = by_meaning.get(_meaning(name), [])
        same = [other for other in same if saved[other]["shape"] == list(leaf.shape)]
        if not same:
            continue
        # Counters have no name of their own: the first of theirs is the first of ours.
        number = turn.get(_meaning(name), 0)
        turn[_meaning(name)] = number + 1
        sources[name] = same[min(number, len(same) - 1)]
    return sources


def _meaning(name: str) -> str:
    return re.sub(r"^opt_state/(\d+/)*", "opt_state/", name)


def _notes(step, wanted, saved, sources, fresh, dropped) -> list[str]:
    def some(names):
        return f"{len(names)} arrays ({', '.join(names[:2])}{', ...' if names[2:] else ''})"

    texts = {
        "opt_state/": (
            "the optimizer: {} are not in the checkpoint and start fresh",
            "the optimizer: {} of the checkpoint are not needed any more",
        ),
        "ema/": (
            f"optim.ema: the moving average starts from the parameters of step {step}: {{}}",
            "optim.ema: the moving average of the checkpoint is dropped: {}",
        ),
    }
    notes = []
    for part, both in texts.items():
        for names, text in zip((fresh, dropped), both, strict=True):
            if names := [name for name in names if name.startswith(part)]:
                notes.append(text.format(some(names)))
    cast = [n for n, s in sources.items() if saved[s]["dtype"] != np.dtype(wanted[n].dtype).name]
    if cast:
        to = np.dtype(wanted[cast[0]].dtype).name
        notes.append(f"the optimizer: {some(cast)} are converted to {to}")
    return notes
