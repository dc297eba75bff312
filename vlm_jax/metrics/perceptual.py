"""LPIPS between images, and VGG16 features of images, in batches of few shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vlm_jax.models import vgg
from vlm_jax.ops import buckets


class Lpips:
    """Distance of pairs of images: 0 for equal ones, about 0.1 for near ones, up to about 1.

    Args:
      params: of `weights.lpips.load`. All five stages are LPIPS as published; fewer are another
        measure and must be reported as such.
      batch: pairs per device call.
    """

    def __init__(self, params: Mapping[str, Any], batch: int = 16):
        self._params, self._batch = params, batch
        self._distance = _lpips(len(params["heads"]))

    def __call__(self, image01: np.ndarray, other01: np.ndarray) -> np.ndarray:
        """Two float32[B, H, W, 3] in [0, 1] -> float64[B]."""
        if image01.shape != other01.shape:
            raise ValueError(f"images of {image01.shape} and {other01.shape} cannot be compared")
        return _in_batches(self._distance, self._params, self._batch, image01, other01)


class Vgg16Features:
    """The mean over the picture of one activation of VGG16, as a description of an image.

    Args:
      params: of `weights.lpips.load`.
      layer: one of `models.vgg.LAYERS`, for example "relu3_3" (256 numbers per image).
      batch: images per device call.
    """

    def __init__(self, params: Mapping[str, Any], layer: str, batch: int = 16):
        if layer not in vgg.LAYERS[: len(params["heads"])]:
            known = ", ".join(vgg.LAYERS[: len(params["heads"])])
            raise ValueError(f"layer={layer!r} is none of {known}")
        self._params, self._batch = params, batch
        self._features = _features(vgg.LAYERS.index(layer) + 1)

    def __call__(self, image01: np.ndarray) -> np.ndarray:
        """float32[B, H, W, 3] in [0, 1] -> float64[B, channels]."""
        return _in_batches(self._features, self._params, self._batch, image01)


@functools.cache
def _lpips(stages: int) -> Callable:
    network = vgg.make(vgg.LpipsConfig(stages=stages))
    return jax.jit(lambda params, a, b: network.bind(params)(a, b))


@functools.cache
def _features(stages: int) -> Callable:
    network = vgg.make(vgg.LpipsConfig(stages=stages))
    return jax.jit(lambda params, x: network.bind(params).vgg(x)[-1].mean((1, 2)))


def _in_batches(function: Callable, params: Any, size: int, *arrays: np.ndarray) -> np.ndarray:
    """`function` over rows; the last batch is filled up to a power of two: few shapes compile."""
    arrays = [np.asarray(x, np.float32) for x in arrays]
    results = [
        np.asarray(function(params, *filled), np.float64)[:count]
        for _, count, filled in buckets.pieces(size, *arrays)
    ]
    return np.concatenate(results) if results else np.zeros(0)
