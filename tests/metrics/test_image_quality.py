"""SSIM against values of scikit-image; PSNR is tested with the system."""

import numpy as np
import pytest

from vlm_jax.metrics import image_quality


def test_ssim_equals_scikit_image():
    y, x, c = np.meshgrid(np.arange(12), np.arange(13), np.arange(3), indexing="ij")
    image01 = ((7 * x + 5 * y + 3 * c) % 17) / 16
    shifted = ((7 * x + 5 * y + 3 * c + (x * y) % 3) % 17) / 16
    greyer = 0.5 * image01 + 0.25
    measured = image_quality.ssim(np.stack([image01] * 3), np.stack([shifted, greyer, image01]))
    # scikit-image 0.26: structural_similarity(a, b, data_range=1, gaussian_weights=True, sigma=1.5,
    # use_sample_covariance=False, channel_axis=-1)
    np.testing.assert_allclose(measured, [0.8560081065341322, 0.8013008504327371, 1.0], rtol=1e-10)


def test_what_ssim_cannot_compare_is_named():
    small = np.zeros((1, 8, 16, 3))
    with pytest.raises(ValueError, match="11 pixels"):
        image_quality.ssim(small, small)
    with pytest.raises(ValueError, match="cannot be compared"):
        image_quality.ssim(small, small[:, :4])
