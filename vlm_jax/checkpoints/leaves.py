"""The leaves of a state by name: flattening, comparing, and whether their values are finite.

A state is any pytree of arrays. Its leaves are called by their '/'-joined paths
("params/layers/attn/q/kernel", "opt_state/0/count"), which is how checkpoints store them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def flatten(tree: Any) -> dict[str, Any]:
    """{'/'-joined path: leaf}, in the tree's own order."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in flat:
            raise ValueError(f"two leaves of the state are called {name!r}")
        flat[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return flat


def describe(leaves: Mapping[str, Any]) -> dict[str, dict]:
    """{name: {"shape", "dtype"}}, JSON-able."""
    return {
        name: {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}
        for name, leaf in leaves.items()
    }


def differences(saved: dict, wanted: dict, compare_dtypes: bool = True) -> list[str]:
    """A line for every leaf (ten at most) that two results of `describe` do not share."""

    def show(leaf):
        return f"{leaf['dtype']}{leaf['shape']}" if leaf else "absent"

    def differs(a, b):
        return not (a and b) or a["shape"] != b["shape"] or (compare_dtypes and a != b)

    names = [name for name in {**saved, **wanted} if differs(saved.get(name), wanted.get(name))]
    if not names:
        return []
    lines = [f"{len(names)} of {len(wanted)} leaves differ."]
    for name in names[:10]:
        lines.append(
            f"  {name}: checkpoint {show(saved.get(name))}, model {show(wanted.get(name))}"
        )
    if len(names) > 10:
        lines.append(f"  and {len(names) - 10} more")
    return lines


def nonfinite(leaves: Mapping[str, Any]) -> list[str]:
    """Names of the leaves that hold NaN or infinity. One pass on the device; collective."""
    names = [name for name, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)]
    found = jax.device_get(_are_finite([leaves[name] for name in names]))
    return [name for name, finite in zip(names, found, strict=True) if not finite]


@jax.jit
def _are_finite(arrays: list[Any]) -> list[Any]:
    return [jnp.isfinite(x).all() for x in arrays]
