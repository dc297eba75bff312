"""The language model that comes with the package, on scenes that its training never had."""

import numpy as np
import pytest

import vlm_jax
from vlm_jax.data import images
from vlm_jax.datasets import few_shot
from vlm_jax.metrics import masks


@pytest.fixture(scope="module")
def model():
    return vlm_jax.load("lvm", "tiny")


def asked(demo_data, answer, count, **queries):
    """(pairs of every prompt, queries, uint8[count, 32, 32, 3] of true answers)."""
    source = few_shot.FewShot(
        {**queries, "split": "heldout", "count": count, "size": 32}, answer, 3
    )
    prompts = [source[index] for index in range(count)]
    pairs = [list(zip(p["prompt"][:-1:2], p["prompt"][1::2])) for p in prompts]
    return pairs, [p["prompt"][-1] for p in prompts], np.stack([p["target"][0] for p in prompts])


@pytest.mark.slow
def test_marks_things_better_than_a_copy_of_the_query(model, demo_data):
    """IoU .69 over the 64 scenes of docs/lvm_evidence.md, where a copy has .15."""
    pairs, queries, true = asked(demo_data, "mask", 32, type="demo_scenes")
    made = np.concatenate(model.analogy(pairs, queries, temperature=0))[:, 0]
    assert made.shape == true.shape == (32, 32, 32, 3) and made.dtype == np.uint8

    def iou(pictures_u8):
        return masks.iou(images.to01(pictures_u8).mean(-1) > 0.5, true[..., 0] > 0).mean()

    assert iou(made) > max(0.5, 3 * iou(np.stack(queries)))
    again = np.concatenate(model.analogy(pairs[:4], queries[:4], temperature=0, seed=7))[:, 0]
    np.testing.assert_array_equal(again, made[:4])


def test_colours_by_example_better_than_a_copy(model, demo_data):
    pairs, queries, true = asked(demo_data, "colour", 16, type="palette_scenes")
    made = np.concatenate(model.analogy(pairs, queries, temperature=0))[:, 0]

    def mse(pictures_u8):
        return np.square(images.to01(pictures_u8) - images.to01(true)).mean()

    assert mse(made) < 0.25 * mse(np.stack(queries))
