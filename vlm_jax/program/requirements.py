"""Whether the installed packages fit, said in one line instead of a trace out of their insides."""

import importlib.metadata
import re

# Those that must fit each other: flax and orbax follow jax's internals.
TOGETHER = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_BOUND = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)$")


def unmet(requirements: list[str] | None = None) -> list[str]:
    """'jax 0.4.30, needs >=0.10' for every required package that is missing or too old.

    Args:
      requirements: "name>=version"; None takes those of the installed vlm_jax, of which extras are
        left out.
    """
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("vlm_jax") or []
        except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
            requirements = []
    problems = []
    for bound in filter(None, map(_BOUND.match, requirements)):
        name, least = bound.groups()
        found = _version(name)
        if not found or _numbers(found) < _numbers(least):
            problems.append(f"{name} {found or 'is not installed'}, needs >={least}")
    return problems


def explain(error: Exception) -> str:
    """Why the program could not be imported, and what to do."""
    cause = f"{type(error).__name__}: {error}".splitlines()[0]
    found = ", ".join(f"{name} {_version(name) or '(not installed)'}" for name in TOGETHER)
    return (
        f"the installed packages do not fit together ({cause}). Installed: {found}. "
        "Install this package again with the versions that it was tested with: "
        "pip install -e . -c constraints.txt"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.match(r"[0-9.]*", version)[0].strip(".").split(".")))
