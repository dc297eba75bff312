"""Patches of images, and positions resized for other grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm_jax.nn import patches


def test_a_patch_is_a_product_of_its_pixels():
    layer = patches.PatchEmbed(nnx.Rngs(0), 4, 5, bias=True)
    layer.bias[...] = jnp.arange(5.0)
    image = np.random.default_rng(0).normal(size=(2, 8, 14, 3)).astype(np.float32)  # 2 columns over
    out = layer(image)
    assert out.shape == (2, 2, 3, 5)
    kernel = np.asarray(layer.kernel[...]).reshape(-1, 5)
    for y, x in np.ndindex(2, 3):
        pixels = image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].reshape(2, -1)
        np.testing.assert_allclose(out[:, y, x], pixels @ kernel + np.arange(5), atol=1e-5)


def test_start_values():
    layer = patches.PatchEmbed(nnx.Rngs(0), 14, 64)
    assert layer.bias is None
    assert float(layer.kernel[...].std()) == pytest.approx((3 * 14 * 14) ** -0.5, rel=0.02)
    flat = patches.PatchEmbed(nnx.Rngs(0), 14, 64, scale=0.02, channels=1)
    assert float(flat.kernel[...].std()) == pytest.approx(0.02, rel=0.05)


def test_positions_of_a_plane_stay_a_plane():
    # Values linear in the place: any resize gives them back at the new cells' centres.
    y, x = np.mgrid[:8, :6] + 0.5
    table = np.concatenate([[[9.0, 9.0]], np.stack([y / 8, x / 6], -1).reshape(-1, 2)])
    out = patches.resize_positions(
        jnp.asarray(table, jnp.float32), (8, 6), (4, 12), leading=1, method="linear"
    )
    assert out.shape == (1 + 48, 2)
    np.testing.assert_array_equal(out[0], [9, 9])
    inner = np.asarray(out[1:]).reshape(4, 12, 2)[1:-1, 1:-1]
    y, x = np.mgrid[:4, :12] + 0.5
    np.testing.assert_allclose(inner, np.stack([y / 4, x / 12], -1)[1:-1, 1:-1], atol=1e-6)


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_resized_as_images(antialias):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(1 + 16, 3)), jnp.bfloat16)
    out = patches.resize_positions(table, (4, 4), (7, 3), leading=1, antialias=antialias)
    assert out.dtype == jnp.bfloat16
    grid = table[1:].reshape(4, 4, 3).astype(jnp.float32)
    wanted = jax.image.resize(grid, (7, 3, 3), "bicubic", antialias=antialias)
    np.testing.assert_array_equal(out[1:].reshape(7, 3, 3), wanted.astype(jnp.bfloat16))


def test_positions_of_the_same_grid_are_not_touched():
    table = jnp.ones((16, 3))
    assert patches.resize_positions(table, (4, 4), (4, 4)) is table
    with pytest.raises(ValueError, match="16 positions are not 1 and a grid of 4 x 4"):
        patches.resize_positions(table, (4, 4), (7, 7), leading=1)
