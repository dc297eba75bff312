"""Token files that a recipe makes for itself; its section `prepare`."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

from vlm_jax.program import config
from vlm_jax.systems.lvm import composed, preparation


def _nothing(workdir: pathlib.Path, **fields: Any) -> None:
    del workdir, fields


_KINDS = {"files": preparation.prepare, "composed": composed.prepare, "nothing": _nothing}


def prepare(workdir: pathlib.Path, *, of: str = "files", **fields: Any) -> None:
    """Writes the token files of a run, unless they are there from the same arguments.

    Args:
      workdir: of the run.
      of: "files" (photos and videos), "composed" (scenes with tasks by example), or "nothing":
        for evaluations, which bring their own data.
      **fields: of `preparation.prepare` or `composed.prepare`.

    Raises:
      ConfigError: unknown `of` or field. DataError: the photos cannot be had.
    """
    if of not in _KINDS:
        raise config.ConfigError(f"prepare.of={of!r} is none of {', '.join(_KINDS)}")
    config.call(functools.partial(_KINDS[of], workdir), fields, "prepare")


prepare.readers = _KINDS  # `describe` lists what `fields` may hold
