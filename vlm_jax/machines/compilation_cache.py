"""Compiled programs of inference are kept for the next process.

In $VLM_JAX_CACHE (~/.cache/vlm_jax), folder "compiled". VLM_JAX_COMPILED=0 switches it off; a cache
of JAX's own that is configured already, JAX_COMPILATION_CACHE_DIR for example, stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform

import jax

from vlm_jax.data import wheels

SWITCH = "VLM_JAX_COMPILED"
_LEAST_S = 0.5  # compilations that take less are not kept


def enable() -> None:
    """Keeps what this process compiles from now on, and uses what others have kept.

    A folder that cannot be written costs time, nothing else.
    """
    if os.environ.get(SWITCH) == "0" or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = wheels.cache_dir() / "compiled" / _machine()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_S)


def _machine() -> str:
    """Of processors that run the same code: a home folder may be shared by different ones."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:16]
