"""CLIP towers: sizes, rules, what blocks and images are refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.models import clip
from vlm_jax.nn import functional

PARAMETERS = {"b32": 151_277_313, "b16": 149_620_737, "l14": 427_616_513, "l14_336": 427_944_193}


def network(cfg):
    return functional.Functional(lambda rngs: clip.Clip(cfg, rngs))


@pytest.mark.parametrize("name", PARAMETERS)
def test_released_sizes(name):
    leaves = jax.tree.leaves(network(clip.PRESETS[name]).abstract())
    assert sum(x.size for x in leaves) == PARAMETERS[name]


def test_every_parameter_has_a_rule_and_every_rule_a_parameter():
    towers = [
        functional.Functional(lambda rngs: clip.VisionTower(clip.VISION_PRESETS["tiny"], rngs)),
        functional.Functional(lambda rngs: clip.TextTower(clip.TEXT_PRESETS["tiny"], rngs)),
    ]
    paths = [path for tower in towers for path in functional.flatten(tower.abstract())]
    for path in paths:
        assert any(re.search(rule, path) for rule, _ in clip.SHARDING_RULES), path
    for rule, _ in clip.SHARDING_RULES:
        assert any(re.search(rule, path) for path in paths), rule


@pytest.fixture(scope="module")
def tiny():
    made = network(clip.PRESETS["tiny"])
    rng = np.random.default_rng(0)

    def draw(x):
        return rng.normal(0, 0.1, x.shape).astype(x.dtype)

    params = jax.tree.map(draw, made.abstract()) | {"logit_scale": np.float32(2.6)}
    return lambda call: jax.jit(lambda params: call(made.bind(params)))(params)


def test_the_text_is_read_up_to_its_end(tiny):
    row = [98, 5, 6, 99]
    texts = jnp.array([row + [0, 0], row + [7, 8], [98, 5, 7, 99, 0, 0]])
    made = tiny(lambda net: net.text(texts))
    np.testing.assert_allclose(made[0], made[1], atol=1e-6)  # what follows the end is not read
    assert np.abs(made[0] - made[2]).max() > 1e-3
    with pytest.raises(ValueError, match="17 tokens for 16 positions"):
        tiny(lambda net: net.text(jnp.zeros((1, 17), jnp.int32)))


def test_patches_count_rows_first(tiny):
    image = np.zeros((1, 32, 32, 3), np.float32)
    image[0, :8, 8:16] = 1  # the second patch of the first row
    patches = np.asarray(tiny(lambda net: net.vision.patches(jnp.asarray(image))))
    assert np.flatnonzero(np.abs(patches[0]).sum(-1)).tolist() == [1]
    with pytest.raises(ValueError, match="32, 32, 3"):
        tiny(lambda net: net.vision(jnp.zeros((1, 40, 32, 3))))


def test_scores_are_cosines(tiny):
    image = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    texts = jnp.array([[98, 1, 99], [98, 2, 99], [98, 3, 99]])
    scores = tiny(lambda net: net(image, texts))
    assert scores.shape == (2, 3)
    assert np.abs(scores).max() <= np.exp(2.66) + 1e-4


def test_normalize_is_the_same_on_both_sides():
    image_u8 = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    host = clip.normalize(image_u8)
    assert host.dtype == np.float32
    assert host[0, 0, 0] == pytest.approx(-0.48145466 / 0.26862954)
    np.testing.assert_allclose(clip.normalize(jnp.asarray(image_u8)), host, atol=1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_bfloat16_and_remat(remat):
    cfg = clip.VisionConfig(64, 2, 8, 32, num_heads=2, remat=remat, dtype="bfloat16")
    tower = functional.Functional(lambda rngs: clip.VisionTower(cfg, rngs))
    image = jnp.zeros((1, 32, 32, 3))

    def loss(params):
        tokens = tower.bind(params).tokens(image)
        assert tokens.dtype == jnp.bfloat16
        return jnp.sum(tokens.astype(jnp.float32) ** 2)

    traced = str(jax.make_jaxpr(jax.grad(loss))(tower.abstract()))
    assert ("remat" in traced or "checkpoint" in traced) == (remat == "full")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(width=65, depth=1, patch_size=8, num_heads=2), "not a multiple of num_heads"),
        (dict(width=64, depth=1, patch_size=9), "not a multiple of patch_size"),
        (dict(width=64, depth=1, patch_size=8, activation="relu"), "activation 'relu'"),
        (dict(width=64, depth=1, patch_size=8, remat="dots"), "remat 'dots'"),
    ],
)
def test_impossible_sizes(fields, message):
    with pytest.raises(ValueError, match=message):
        clip.VisionConfig(**fields)
