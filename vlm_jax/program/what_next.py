"""The last lines of a training run: where its results lie, and what to do with them."""

from __future__ import annotations

import pathlib

from vlm_jax import task as task_lib


def lines(workdir: pathlib.Path, system: str, step: int) -> list[str]:
    """Where checkpoint, curves and pictures of a step are, and a command to go on with.

    Args:
      workdir: of the run.
      system: as the recipe names it.
      step: the newest that is saved.
    """
    found = [f"checkpoint: {workdir / 'checkpoints' / str(step)}"]
    if (workdir / "curves.png").exists():
        found.append(f"curves: {workdir / 'curves.png'}")
    found += [f"picture: {path}" for path in sorted(workdir.glob(f"eval/{step:08d}/*/*.png"))]
    if command := _predict(system):
        found.append(f"next: python -m vlm_jax.predict {system} --checkpoint={workdir} {command}")
    return found


def _predict(system: str) -> str:
    """The rest of an example of the command line of a system, "" where it has none."""
    try:
        commands = task_lib.resolve(f"vlm_jax.systems.{system}.command_line", "systems")
    except ValueError:
        return ""
    return getattr(commands, "EXAMPLE", "--help")
