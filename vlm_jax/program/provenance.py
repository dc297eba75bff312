"""What made a run: package versions, the git revision of the code, the devices."""

import importlib.metadata
import pathlib
import platform
import subprocess
import sys

import vlm_jax

# Those whose version can change a number.
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array_record",
    "numpy",
    "pillow",
    "ml_collections",
)


def collect(devices=None) -> dict:
    """Everything below as one JSON-able dict.

    Args:
      devices: jax devices of the run, or None to leave them out (then jax is not imported).
    """
    found = {
        "versions": versions(),
        "git": git_revision(),
        "command": list(sys.argv),
    }
    if devices:
        found["device"] = {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "processes": len({device.process_index for device in devices}),
        }
    return found


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the installed packages among PACKAGES."""
    found = {"python": platform.python_version(), "vlm_jax": vlm_jax.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str:
    """Revision of the checkout this package is run from, "+changes" added when it is edited.

    Returns:
      "" when the package is installed rather than run from its own checkout, or git is absent.
    """
    here = pathlib.Path(__file__).resolve()
    try:
        # An installed copy may lie inside another project's checkout: only a tracked file counts.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        revision = _git(here.parent, "rev-parse", "HEAD")
        changed = _git(here.parents[1], "status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision + ("+changes" if changed else "")


def _git(folder: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=20,
    )
    return done.stdout.strip()
