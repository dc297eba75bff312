"""VGG16 in place of CLIP's image tower."""

import dataclasses

import jax
import numpy as np
import pytest

from vlm_jax.models import clip, vgg, vgg_tower
from vlm_jax.nn import functional
from vlm_jax.systems import nxtp


def test_tokens_are_the_halved_activation_and_their_mean():
    cfg = vgg_tower.VggTowerConfig(image_size=16, stages=2)
    assert (cfg.width, cfg.num_patches) == (128, 16)
    tower = functional.Functional(lambda rngs: vgg_tower.VggTower(cfg, rngs))
    params = tower.init(jax.random.key(0))
    image_u8 = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    tokens = np.asarray(tower.bind(params).tokens(clip.normalize(image_u8)))
    assert tokens.shape == (2, 17, 128)

    network = functional.Functional(lambda rngs: vgg.Vgg16(vgg.LpipsConfig(2), rngs))
    last = np.asarray(network.bind(params["vgg"])(image_u8.astype(np.float32) / 255)[-1])
    assert last.shape == (2, 8, 8, 128)
    halved = last.reshape(2, 4, 2, 4, 2, 128).max((2, 4)).reshape(2, 16, 128)
    plain = np.concatenate([halved.mean(1, keepdims=True), halved], axis=1)
    centred = plain - plain.mean(-1, keepdims=True)
    expected = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(tokens, expected, atol=2e-3)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="multiple of 16"):
        vgg_tower.VggTowerConfig(image_size=40)
    with pytest.raises(ValueError, match="VGG16 has 1 to 5"):
        vgg_tower.VggTowerConfig(stages=6)


def test_flops_of_the_first_stage():
    # 3 -> 64 and 64 -> 64 channels, nine taps, two operations each.
    cfg = vgg_tower.VggTowerConfig(image_size=2, stages=1)
    assert cfg.training_flops == 4 * 18 * (3 * 64 + 64 * 64)


def test_a_task_takes_it():
    model = dict(vision=dict(preset="vgg16", image_size=32), decoder=dict(preset="tiny"))
    task = nxtp.make_task(model, delimiter_id=3)
    assert task.cfg.num_image == 4
    assert dataclasses.replace(task.cfg.vision, image_size=64).num_patches == 16
    assert set(jax.eval_shape(task.init, jax.random.key(0))["vision"]) == {"vgg", "post_norm"}
