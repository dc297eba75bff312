"""Memory that is free, and what loading and training take of it.

Estimates count parameters and what lies beside them, not activations, caches and compiled
programs. `load` refuses what cannot fit before it reads anything; training warns. Where the free
memory is not known nothing is said. VLM_JAX_MEMORY_CHECK=0 switches both off.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.nn import functional

_SWITCH = "VLM_JAX_MEMORY_CHECK"
_UNLIMITED = 2**60  # cgroups write "no limit" as a number of about 2**63


class NotEnoughMemory(ValueError):
    """Something that cannot fit; the message has both figures and what would help."""


# ---- what is free ------------------------------------------------------------------------------


def host_free(root: str = "/") -> int | None:
    """Bytes that this process may still take: of the machine, and of its cgroups' limits.

    Args:
      root: of the file system, for tests.
    """
    rooms = [*_machine(pathlib.Path(root)), *_cgroups(pathlib.Path(root))]
    return max(0, min(rooms)) if rooms else None


def device_free(device: Any) -> int | None:
    """Bytes of a jax device's own memory that are free; None for CPUs and where it is unknown."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def _machine(root: pathlib.Path) -> Iterator[int]:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if found:
        yield int(found[1]) * 1024


def _cgroups(root: pathlib.Path) -> Iterator[int]:
    """Room below the limit of every cgroup that this process is in, of both versions.

    A container may see its own group at the top, whatever /proc/self/cgroup calls it.
    """
    top = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        first = top / "memory" if controllers else top
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        group = first / path.strip("/")
        for folder in (group, *group.parents):
            room = _room(folder, *names)
            if room is not None:
                yield room
            if folder == first:
                break


def _room(folder: pathlib.Path, limit: str, usage: str, reclaimable: str) -> int | None:
    numbers = [_text(folder / name).strip() for name in (limit, usage)]
    if not all(number.isdigit() for number in numbers) or int(numbers[0]) >= _UNLIMITED:
        return None
    found = re.search(rf"^{reclaimable} (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
    return int(numbers[0]) - int(numbers[1]) + (int(found[1]) if found else 0)


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""


# ---- loading -----------------------------------------------------------------------------------


def require_for_loading(name: str, params: Any, *, copy_dtype: str = "") -> None:
    """Refuses parameters that do not fit, before they are read.

    Args:
      name: of what is loaded.
      params: the tree of shapes and dtypes as they are held.
      copy_dtype: of a second copy, in the layout that computes; "" makes none.

    Raises:
      NotEnoughMemory: with the figures and what would help.
    """
    if os.environ.get(_SWITCH) == "0":
        return
    held, count = num_bytes(params), num_params(params)
    copy = count * jnp.dtype(copy_dtype).itemsize if copy_dtype else 0
    device = jax.local_devices()[0]
    own = device_free(device)
    needs = [("host", host_free(), held + (copy if own is None else 0))]
    needs += [(device.device_kind, own, held + copy)] if own is not None else []
    for where, free, need in needs:
        if free is None or need <= free:
            continue
        parts = f"{gib(held)} as held"
        if copy and need > held:
            parts += f" and {gib(copy)} in {copy_dtype} to compute with"
        help_ = '; dtype="bfloat16" needs less' if _has(params, copy_dtype, "float32") else ""
        raise NotEnoughMemory(
            f"{name} needs {gib(need)} of {where} memory to load ({count:,} parameters: {parts}), "
            f"{gib(free)} are free. End other programs or take a machine with more"
            f"{help_}; {_SWITCH}=0 tries all the same"
        )


def num_bytes(tree: Any) -> int:
    """Of all leaves, which have shape and dtype."""
    return sum(
        int(np.prod(x.shape, dtype=np.int64)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def num_params(tree: Any) -> int:
    """Numbers in all leaves."""
    return sum(int(np.prod(x.shape, dtype=np.int64)) for x in jax.tree.leaves(tree))


def gib(count: int) -> str:
    """Bytes for a message."""
    return f"{count / 2**30:.2f} GiB"


def _has(params: Any, copy_dtype: str, dtype: str) -> bool:
    return copy_dtype == dtype or any(x.dtype == dtype for x in jax.tree.leaves(params))


# ---- training ----------------------------------------------------------------------------------


def warnings_of_training(
    state: Mapping[str, Any], shardings: Mapping[str, Any], learned: Mapping[str, Any]
) -> list[str]:
    """Warnings about a state that does not fit, or none.

    Args:
      state: shapes and dtypes: "params", "opt_state", and "ema" where there is one.
      shardings: of its leaves.
      learned: path -> shape and dtype of the parameters that have gradients.
    """
    if os.environ.get(_SWITCH) == "0":
        return []
    of_params = functional.flatten(shardings["params"])
    parts = {
        "parameters": _per_device(state["params"], shardings["params"]),
        "moments": _per_device(state["opt_state"], shardings["opt_state"]),
        "average": _per_device(state["ema"], shardings["ema"]) if "ema" in state else 0,
        "gradients": _per_device(dict(learned), {path: of_params[path] for path in learned}),
    }
    need, lasting = sum(parts.values()), sum(parts.values()) - parts["gradients"]
    devices = jax.local_devices()
    own = [x for x in map(device_free, devices) if x is not None]
    listed = " + ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    found = []
    if own and need > min(own):
        found.append(_warning(f"each {devices[0].device_kind} needs {gib(need)}", listed, min(own)))
    free = host_free()
    if free is not None and not own and need * len(devices) > free:
        what = f"the host needs {gib(need * len(devices))} for {len(devices)} device(s), each"
        found.append(_warning(what, listed, free))
    elif free is not None and own and lasting * len(devices) > free:
        what = f"the host needs {gib(lasting * len(devices))} while a checkpoint is written, for"
        found.append(_warning(what, listed, free))
    return found


def _per_device(tree: Any, shardings: Any) -> int:
    """Bytes on one device."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    shapes = [jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype) for x, s in pairs]
    return num_bytes(shapes)


def _warning(what: str, listed: str, free: int) -> str:
    return (
        f"warning: memory: {what} {listed}, activations not counted, and {gib(free)} are free. "
        "What helps: more devices on mesh.fsdp or mesh.tensor, optim.moment_dtype=bfloat16, "
        "model.dtype=bfloat16, model.remat=full, train.accumulate, a narrower optim.trainable; "
        f"{_SWITCH}=0 silences this"
    )
