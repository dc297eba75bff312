"""Low-rank additions to matrices: which ones have one, and adding them to the kernels for good.

    q/kernel [d, n, h]    q/lora_a [d, r]    q/lora_b [r, n, h]

Merged parameters are those of the same network without LoRA; they decode without its two further
products, and are what is exported.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.nn import functional

_LEAVES = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which matrices of a block have an addition.

    Attributes:
      rank: 0 is none. scale: factor on it.
      modules: names, of q, k, v, o, gate, up, down.
    """

    rank: int = 0
    scale: float = 1.0
    modules: tuple[str, ...] = ("q", "v")

    def of(self, name: str) -> dict[str, Any]:
        """Arguments of `linear.Linear` for the matrix of this name."""
        return dict(lora_rank=self.rank if name in self.modules else 0, lora_scale=self.scale)


NONE = Lora()


def is_addition(path: str) -> bool:
    """True for 'layers/attn/q/lora_a'."""
    return path.rpartition("/")[2] in _LEAVES


def merge(params: functional.Params, scale: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters of the network without LoRA, what was taken out of them).

    The sum is made in float32 and rounded to the kernel's dtype.

    Args:
      params: with or without additions; arrays or shapes.
      scale: of the configuration, `lora_scale`.

    Raises:
      ValueError: half an addition, or one without a kernel.
    """
    return _split(params, scale)


def unmerge(
    params: functional.Params, additions: functional.Params, scale: float
) -> dict[str, Any]:
    """Inverse of `merge`, up to the rounding of the kernels' dtype.

    Raises:
      ValueError: additions for what is not there.
    """
    merged, given = functional.flatten(params), functional.flatten(additions)
    for path in given:
        if f"{path.rpartition('/')[0]}/kernel" not in merged:
            raise ValueError(f"{path} belongs to no kernel of these parameters")
    plain, _ = _split(functional.unflatten({**merged, **given}), -scale)
    return functional.unflatten({**functional.flatten(plain), **given})


def _split(params, scale):
    flat = functional.flatten(params)
    additions = {path: x for path, x in flat.items() if is_addition(path)}
    plain = {path: x for path, x in flat.items() if path not in additions}
    for module in sorted({path.rpartition("/")[0] for path in additions}):
        names = f"{module}/kernel", *(f"{module}/{leaf}" for leaf in _LEAVES)
        missing = [name for name in names if name not in flat]
        if missing:
            raise ValueError(f"{missing[0]} is missing beside the other parts of its addition")
        plain[names[0]] = _added(*(flat[name] for name in names), scale)
    return functional.unflatten(plain), functional.unflatten(additions)


def _added(kernel, a, b, scale):
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return kernel
    stack = a.ndim + b.ndim - 2 - kernel.ndim

    def add(kernel, a, b):
        whole = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
        return kernel + scale * whole

    for _ in range(stack):
        add = jax.vmap(add)
    return add(*(x.astype(jnp.float32) for x in (kernel, a, b))).astype(kernel.dtype)
