"""The folders of single steps: which count, what their meta.json says, why one is not used.

    <workdir>/checkpoints/300/state/...      arrays (orbax, OCDBT)
                             /meta.json      step, config, versions, data position, names and shapes
                             /COMMIT.json    size and SHA-256 of every other file; written last

A folder counts when its name is a number as we write it (ASCII digits, no leading zero). Whatever
else lies beside it is left alone. See checkpoints.py for what is done with them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

from etils import epath

from vlm_jax.checkpoints import commit_marker

META = "meta.json"
_NUMBER = re.compile(r"0|[1-9][0-9]*")


def why_not_writable(workdir: os.PathLike | str) -> str:
    """What in a folder's name keeps checkpoints from being written below it; "" if nothing.

    The libraries that write them take some characters as patterns, separators or URLs, and then
    fail late, or leave a checkpoint that cannot be read.
    """
    name = os.fspath(workdir)
    found = sorted(set("*?[]\\") & set(name))
    if re.search(":(/|$)", name):
        found.append(":/")
    if found:
        listed = ", ".join(map(repr, found))
        return f"the checkpoint library does not take {listed} as part of a name; choose another"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return (
            "its name is not valid UTF-8, or this locale is not (set PYTHONUTF8=1 or "
            "LC_ALL=C.UTF-8); choose another otherwise"
        )
    return ""


def steps(folder: epath.Path) -> list[int]:
    """Numbers of the step folders in `folder`, good or not, ascending.

    Raises:
      OSError: `folder` is a file, or must not be read.
    """
    try:
        entries = list(folder.iterdir())
    except FileNotFoundError:
        return []
    return sorted(int(path.name) for path in entries if is_step(path) and path.is_dir())


def is_step(folder: epath.Path) -> bool:
    """Whether this is the name of a step folder; says nothing about what is there."""
    return bool(_NUMBER.fullmatch(folder.name))


def why_unusable(folder: epath.Path) -> str:
    """One line saying why a step cannot be trusted; "" if it can. Reads every file."""
    if not folder.is_dir():
        return f"{folder} is {'not a folder' if folder.exists() else 'not there'}"
    if reason := commit_marker.why_bad(folder):
        return reason
    try:
        saved = read(folder)
    except ValueError as error:
        return str(error)
    if is_step(folder) and saved["step"] != int(folder.name):
        return f"{folder} says in its {META} that it is step {saved['step']}; it was renamed"
    if names := saved.get("nonfinite"):
        return f"{folder} holds values that are not finite, in {', '.join(map(str, names[:3]))}"
    return ""


def newest(folder: epath.Path, passed_over: set[int]) -> int:
    """The newest step that `why_unusable` has nothing against, or -1.

    Steps that are newer and cannot be used join `passed_over`, with one line each on stderr; those
    in it already are not looked at.
    """
    for step in reversed(steps(folder)):
        if step in passed_over:
            continue
        reason = why_unusable(folder / str(step))
        if not reason:
            return step
        pass_over(step, reason, passed_over)
    return -1


def pass_over(step: int, reason: str, passed_over: set[int]) -> None:
    """Notes that a step is not used, and says why."""
    passed_over.add(step)
    print(
        f"checkpoints: checkpoint of step {step} is not used: {reason}", file=sys.stderr, flush=True
    )


def read(folder: epath.Path) -> dict[str, Any]:
    """meta.json of a step: "step", "meta" (of the run), "leaves", and "nonfinite" in newer ones.

    Raises:
      ValueError: it is missing or not one of ours.
    """
    try:
        saved = json.loads((folder / META).read_text())
        if isinstance(saved["step"], int) and isinstance(saved["leaves"], dict):
            if isinstance(saved["meta"], dict):
                return saved
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / META}: {commit_marker.one_line(error)}") from error
    raise ValueError(f"{folder / META} is not of a checkpoint of ours")


def is_cut_off(folder: epath.Path) -> bool:
    """Whether a save of orbax was killed here: nothing in the folder can be read."""
    # Orbax renames this temporary folder to `state` at its end.
    return folder.is_dir() and any(
        path.name.startswith("state.orbax-checkpoint-tmp") for path in folder.iterdir()
    )


def move_aside(folder: epath.Path) -> None:
    """Makes room for a step where something unusable lies: cut-off saves go, the rest is kept."""
    if is_cut_off(folder):
        folder.rmtree()
        return
    taken = {path.name for path in folder.parent.iterdir()}
    names = (f"rejected-{folder.name}-{n}" for n in range(len(taken) + 1))
    os.rename(folder, folder.parent / next(name for name in names if name not in taken))
