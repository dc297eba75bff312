"""Device meshes, and where each parameter and each row of a batch lives.

Mesh axes: `data` (replicas), `fsdp` (parameters cut by their widths, batch cut by rows) and
`tensor` (heads, MLP width, vocabulary). A batch is cut over (data, fsdp). A rule table beside each
network maps parameter paths to PartitionSpecs; the first match counts, and a parameter without a
match is an error.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.nn import functional
from vlm_jax.program import config as config_lib

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, "all devices that are left".

    Attributes:
      data: devices with all of the parameters each, and other rows.
      fsdp: devices that share parameters and optimizer state, and have other rows.
      tensor: devices that share the width of a network, and have the same rows.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    spelled = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise config_lib.ConfigError(f"{spelled}: sizes are positive, and at most one may be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if rest and len(devices) % fixed == 0:
        sizes[rest[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise config_lib.ConfigError(
            f"{spelled} needs a {'multiple' if rest else 'total'} of {fixed} devices, "
            f"and there are {len(devices)}; set one axis to -1 to take what is left"
        )
    # Auto: newer versions of jax default to Explicit axes, under which hints are assertions.
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def match(
    rules: Sequence[tuple[str, PartitionSpec]], params: functional.Params
) -> dict[str, PartitionSpec]:
    """The PartitionSpec of every parameter, by path.

    Raises:
      ConfigError: parameters that no rule matches, all of them by name.
    """
    specs, missed = {}, []
    for path, leaf in functional.flatten(params).items():
        for pattern, spec in rules:
            if re.search(pattern, path):
                specs[path] = spec
                if len(spec) > len(leaf.shape):
                    raise config_lib.ConfigError(
                        f"rule {pattern!r} gives {spec} to {path} of shape {leaf.shape}: "
                        f"more axes than the parameter has"
                    )
                break
        else:
            missed.append(path)
    if missed:
        raise config_lib.ConfigError(
            f"no sharding rule matches {len(missed)} parameters: {', '.join(missed[:8])}"
            f"{', ...' if len(missed) > 8 else ''}; add a rule beside the network"
        )
    return specs


def of_params(
    mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]], params: functional.Params
) -> dict[str, Any]:
    """A NamedSharding for every parameter, in the parameters' own tree.

    A mesh axis that does not divide its dimension is left out for that dimension, and said so
    on stderr: 8292 ids cannot be cut into 8.
    """
    shapes = functional.flatten(params)
    dropped, result = [], {}
    for path, spec in match(rules, params).items():
        kept = []
        for size, axes in zip(shapes[path].shape, spec):
            names = (axes,) if isinstance(axes, str) else tuple(axes or ())
            if names and size % math.prod(mesh.shape[name] for name in names):
                dropped.append(f"{path} ({size} by {'*'.join(names)})")
                axes = None
            kept.append(axes)
        result[path] = NamedSharding(mesh, PartitionSpec(*kept))
    if dropped and jax.process_index() == 0:
        print(
            f"[sharding] {len(dropped)} dimensions are not divisible by their mesh axis and stay "
            f"whole: {', '.join(dropped[:4])}{', ...' if len(dropped) > 4 else ''}",
            file=sys.stderr,
        )
    return functional.unflatten(result)


def like_params(mesh: Mesh, tree: Any, param_shardings: Mapping[str, NamedSharding]) -> Any:
    """Shardings for a tree whose leaves belong to parameters, such as an optimizer's state.

    A leaf whose path ends in a parameter's (flat) path is laid out like that parameter; all
    others (counters) are replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def pick(path, leaf):
        for entry in reversed(path):
            sharding = param_shardings.get(getattr(entry, "key", None))
            if sharding is not None and len(sharding.spec) <= len(leaf.shape):
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(pick, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def of_batch(mesh: Mesh) -> NamedSharding:
    """Rows over (data, fsdp)."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_of_process(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of the global batch that this process's devices need, ascending.

    With the tensor axis across hosts, several hosts need the same rows; asking the sharding
    itself is right for every mesh.
    """
    shares = of_batch(mesh).addressable_devices_indices_map((batch_size,))
    rows = {row for (index,) in shares.values() for row in range(batch_size)[index]}
    return np.array(sorted(rows), np.int64)


def owned_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Of `rows_of_process`, those that no process before this one needs too.

    So every row of a global batch has one owner.
    """
    shares = of_batch(mesh).devices_indices_map((batch_size,))
    owner: dict[int, int] = {}
    for device, (index,) in shares.items():
        for row in range(batch_size)[index]:
            owner[row] = min(owner.get(row, device.process_index), device.process_index)
    mine = jax.process_index()
    return np.array(sorted(row for row, process in owner.items() if process == mine), np.int64)


def place_batch(
    mesh: Mesh, arrays: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int
) -> dict[str, jax.Array]:
    """Makes global arrays [batch_size, ...] from the rows that this process has loaded."""
    position = np.full(batch_size, -1)
    position[rows] = np.arange(len(rows))
    sharding = of_batch(mesh)

    def place(x):
        return jax.make_array_from_callback(
            (batch_size, *x.shape[1:]), sharding, lambda index: x[position[index[0]]]
        )

    return {key: place(x) for key, x in arrays.items()}
