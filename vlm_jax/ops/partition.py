"""Sharding hints for activations; they do nothing while no mesh is active.

The trainer enters `use_mesh(mesh)` around the *tracing* of its step (inside the traced function is
the safest place: the mesh is not part of jit's cache key). Networks call `constrain`, and run
unchanged on one device, in a notebook, without any mesh.
"""

from __future__ import annotations

import contextlib
import contextvars
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH = ("data", "fsdp")  # rows of a batch are spread over both axes

_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("vlm_jax_mesh", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None):
    """Makes `constrain` act on this mesh, whose axes must be of type Auto."""
    token = _MESH.set(mesh)
    try:
        yield mesh
    finally:
        _MESH.reset(token)


def active_mesh() -> Mesh | None:
    """The mesh of the innermost `use_mesh`, or None."""
    return _MESH.get()


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the code being traced will run on.

    A mesh may describe hardware that is not attached (ahead-of-time compilation), so it decides.
    """
    mesh = active_mesh()
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def spec(shape: tuple[int, ...], axes: tuple, mesh: Mesh) -> PartitionSpec:
    """`axes` without the mesh axes that are absent or do not divide their dimension.

    Args:
      shape: of the array.
      axes: per dimension None, a mesh axis name, or a tuple of names.
      mesh: the mesh.

    Raises:
      ValueError: more axes than dimensions.
    """
    if len(axes) > len(shape):
        raise ValueError(f"{len(axes)} sharding axes {axes} for an array of shape {shape}")
    entries = []
    for size, axis in zip(shape, axes):
        names = (axis,) if isinstance(axis, str) else tuple(axis or ())
        names = tuple(n for n in names if mesh.shape.get(n, 1) > 1)
        divides = size % math.prod(mesh.shape[n] for n in names) == 0
        entries.append((names if len(names) > 1 else names[0]) if names and divides else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Asks for a layout of `x`, one entry per dimension: `constrain(x_btd, BATCH, None, None)`."""
    mesh = active_mesh()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(x.shape, axes, mesh)))
