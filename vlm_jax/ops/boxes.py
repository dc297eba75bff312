"""Boxes (x0, y0, x1, y1): areas, IoU, generalised IoU.

Corners are ordered; a box whose corners are not has no area.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def area(boxes_x: jax.Array) -> jax.Array:
    """float[..., 4] -> [...]."""
    sides = jnp.maximum(boxes_x[..., 2:] - boxes_x[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def is_ordered(boxes_x: jax.Array) -> jax.Array:
    """bool[...], x1 >= x0 and y1 >= y0; False for NaN."""
    return jnp.all(boxes_x[..., 2:] >= boxes_x[..., :2], axis=-1)


def iou(a_x: jax.Array, b_x: jax.Array) -> jax.Array:
    """Intersection over union, [...]; 0 for two boxes without area.

    Args:
      a_x, b_x: float[..., 4] of shapes that broadcast: one to one, or all to all with an axis of
        size 1 in each.
    """
    return _overlap(a_x, b_x)[0]


def giou(a_x: jax.Array, b_x: jax.Array) -> jax.Array:
    """IoU less the share of the hull that neither covers, -1 ... 1.

    Rezatofighi et al., arXiv 1902.09630. Without an epsilon; gradients are finite whatever the
    boxes are.
    """
    value, union = _overlap(a_x, b_x)
    low, high = jnp.minimum(a_x, b_x)[..., :2], jnp.maximum(a_x, b_x)[..., 2:]
    hull = area(jnp.concatenate([low, high], axis=-1))
    return value - (hull - union) / jnp.where(hull > 0, hull, 1)


def _overlap(a_x, b_x):
    """(IoU, union)."""
    low, high = jnp.maximum(a_x, b_x)[..., :2], jnp.minimum(a_x, b_x)[..., 2:]
    both = area(jnp.concatenate([low, high], axis=-1))
    union = area(a_x) + area(b_x) - both
    return both / jnp.where(union > 0, union, 1), union
