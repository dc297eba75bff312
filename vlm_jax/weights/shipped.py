"""Trained weights that come with the package: assets/SYSTEM_NAME, in our own format."""

from __future__ import annotations

import importlib.resources
import os


def folder_of(system: str, path: str | os.PathLike) -> str | os.PathLike:
    """The folder of the weights called `path`, for example "tiny"; other paths stay."""
    if isinstance(path, str) and path.isidentifier():
        folder = importlib.resources.files("vlm_jax") / "assets" / f"{system}_{path}"
        if folder.is_dir():
            return str(folder)
    return path
