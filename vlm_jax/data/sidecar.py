"""Arrays derived from data files (line offsets, token counts), computed once and kept.

They live in the cache directory, under a digest of what they were derived from, so a changed file
or setting is simply another entry. Written with a temporary name: safe for many processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import wheels

Arrays = Mapping[str, np.ndarray]


def fingerprint(paths: Sequence[pathlib.Path]) -> list[Any]:
    """Path, size and time of change of every file."""
    result = []
    for path in paths:
        status = path.stat()
        result.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
    return result


def load(kind: str, key: Any, build: Callable[[], Arrays]) -> dict[str, np.ndarray]:
    """The arrays kept for (kind, key), or those that `build` computes now.

    Args:
      kind: file name prefix, for example "jsonl-2"; the number changes when the arrays do.
      key: JSON-like; everything that the arrays depend on.
      build: computes them.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    below = pathlib.Path("index") / f"{kind}-{digest}.npz"
    try:
        with np.load(wheels.cache_dir() / below, allow_pickle=False) as kept:
            return dict(kept)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        arrays = dict(build())
    try:
        _keep(wheels.writable_cache_dir() / below, arrays)
    except OSError as error:  # a full disk: it costs time at the next start, not this run
        print(f"vlm_jax: {kind} is not kept for the next start: {error}", file=sys.stderr)
    return arrays


def _keep(path: pathlib.Path, arrays: Arrays) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = tempfile.NamedTemporaryFile(dir=path.parent, delete=False)
    try:
        with temporary:
            np.savez(temporary, **dict[str, Any](arrays))
        os.replace(temporary.name, path)
    except OSError:  # what is there of it would stay for ever
        os.unlink(temporary.name)
        raise
