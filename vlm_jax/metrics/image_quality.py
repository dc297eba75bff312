"""How close an image is to another."""

from __future__ import annotations

import numpy as np


def psnr(image01: np.ndarray, other01: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB per image, for a peak of 1.

    -10 log10 of the mean squared error over all pixels and channels. 100 dB for equal images, so
    that means over a data set stay finite.

    Args:
      image01, other01: float[B, H, W, C] in [0, 1].

    Returns:
      float64[B].
    """
    if image01.shape != other01.shape:
        raise ValueError(f"images of {image01.shape} and {other01.shape} cannot be compared")
    error = image01.astype(np.float64) - other01.astype(np.float64)
    mse_b = np.square(error).reshape(len(error), -1).mean(axis=1)
    return -10.0 * np.log10(np.maximum(mse_b, 1e-10))
