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
    _check_alike(image01, other01)
    error = image01.astype(np.float64) - other01.astype(np.float64)
    mse_b = np.square(error).reshape(len(error), -1).mean(axis=1)
    return -10.0 * np.log10(np.maximum(mse_b, 1e-10))


# Wang et al. 2004: Gaussian window of 11 x 11 pixels with standard deviation 1.5.
_WINDOW = np.exp(-0.5 * np.square(np.arange(-5, 6) / 1.5))
_WINDOW /= _WINDOW.sum()


def ssim(image01: np.ndarray, other01: np.ndarray) -> np.ndarray:
    """Structural similarity per image, for values in [0, 1]; 1 for equal images.

    Wang et al. 2004 (the constants 0.01 and 0.03), channel by channel, averaged over channels and
    over the places where the window lies inside the image. Equals scikit-image's
    `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1)`.

    Args:
      image01, other01: float[B, H, W, C] in [0, 1], both sides at least 11.

    Returns:
      float64[B].
    """
    _check_alike(image01, other01)
    if min(image01.shape[1:3]) < len(_WINDOW):
        raise ValueError(f"SSIM needs {len(_WINDOW)} pixels a side, images are {image01.shape}")
    a_byxc, b_byxc = image01.astype(np.float64), other01.astype(np.float64)
    mean_a, mean_b = _smooth(a_byxc), _smooth(b_byxc)
    variance_a = _smooth(a_byxc**2) - mean_a**2
    variance_b = _smooth(b_byxc**2) - mean_b**2
    covariance = _smooth(a_byxc * b_byxc) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return similarity.mean((1, 2, 3))


def _smooth(x_byxc: np.ndarray) -> np.ndarray:
    """The window over the places where it fits; one axis after the other."""
    for axis in (1, 2):
        kept = x_byxc.shape[axis] - len(_WINDOW) + 1
        x_byxc = sum(
            weight * x_byxc.take(range(start, start + kept), axis)
            for start, weight in enumerate(_WINDOW)
        )
    return x_byxc


def _check_alike(image01: np.ndarray, other01: np.ndarray) -> None:
    if image01.shape != other01.shape:
        raise ValueError(f"images of {image01.shape} and {other01.shape} cannot be compared")
