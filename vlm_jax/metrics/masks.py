"""Overlap of masks and of boxes."""

from __future__ import annotations

import numpy as np


def iou(mask: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union, float64[B], of bool[B, H, W]; 1 where both are empty."""
    if mask.shape != other.shape:
        raise ValueError(f"masks of {mask.shape} and {other.shape} cannot be compared")
    both = (mask & other).sum((1, 2)).astype(np.float64)
    either = (mask | other).sum((1, 2))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def boxes_of(mask: np.ndarray) -> np.ndarray:
    """Smallest boxes around bool[B, H, W]: int64[B, (x0, y0, x1, y1)], ends excluded.

    Zeros for an empty mask.
    """
    result = np.zeros((len(mask), 4), np.int64)
    for row, one in enumerate(mask):
        ys, xs = np.flatnonzero(one.any(axis=1)), np.flatnonzero(one.any(axis=0))
        if len(ys):
            result[row] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
    return result


def box_iou(boxes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union, float64[B], of [B, (x0, y0, x1, y1)]; 0 where both are empty."""
    low, high = np.maximum(boxes[:, :2], other[:, :2]), np.minimum(boxes[:, 2:], other[:, 2:])
    both = np.maximum(high - low, 0).prod(axis=1).astype(np.float64)
    either = sum((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, other)) - both
    return np.where(either > 0, both / np.maximum(either, 1e-9), 0.0)
