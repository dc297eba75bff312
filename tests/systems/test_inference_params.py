"""Predictors on meshes, on parameters as they are trained and as they are laid out for decoding."""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from vlm_jax.models import llama
from vlm_jax.ops import partition
from vlm_jax.program import evaluate, sharding
from vlm_jax.systems import lvm, nxtp
from vlm_jax.systems.nextchat import task as nextchat

MESHES = {"1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}


def lvm_task():
    # Sizes that every axis divides, heads and key heads too.
    cfg = llama.LlamaConfig(72, 32, 2, 64, 4, num_kv_heads=2, max_tokens=64)
    return lvm.LvmTask(cfg, codebook_size=64, tokens_per_image=4, context_images=2)


def lvm_batch(task):
    ids = np.random.default_rng(1).integers(0, 64, (8, 13)).astype(np.int32)
    tokens, targets = ids[:, :-1], ids[:, 1:]
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": np.ones(tokens.shape, np.float32),
        "segments": np.ones(tokens.shape, np.int32),
        "positions": np.tile(np.arange(12, dtype=np.int32), (8, 1)),
    }


def nxtp_task():
    return nxtp.make_task(
        dict(vision=dict(preset="tiny"), decoder=dict(preset="tiny")),
        k=3,
        max_tokens=4,
        delimiter_id=5,
    )


def nxtp_batch(task):
    side = task.cfg.vision.image_size
    rng = np.random.default_rng(1)
    tokens = np.tile(np.array([64, 1, 7, 9, 5, 8, 5, 65], np.int32), (8, 1))
    return {
        "image_u8": rng.integers(0, 255, (8, side, side, 3), np.uint8),
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": np.ones(tokens.shape, np.float32),
        "segments": np.tile(np.array([1, 1, 1, 2, 2, 3, 3, 0], np.int32), (8, 1)),
        "label_positions": np.tile(np.array([0, 1, 2, 3, 4, 2, 3, 7], np.int32), (8, 1)),
        "prompt": tokens[:, :3],
    }


def nextchat_task():
    parts = dict.fromkeys(("vision", "decoder", "sam"), dict(preset="tiny"))
    return nextchat.make_task(parts)


def nextchat_batch(task):
    cfg, rng = task.cfg, np.random.default_rng(1)
    tokens = rng.integers(3, 400, (8, 32)).astype(np.int32)
    tokens[:, 2:18] = cfg.patch_id
    tokens[:, [1, 18]] = cfg.start_id, cfg.end_id
    tokens[:, [22, 23]] = tokens[:4, [26, 27]] = cfg.at_id, cfg.boxes_id
    return {
        "image_u8": rng.integers(0, 255, (8, 56, 56, 3), np.uint8),
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": np.tile(np.arange(32) > 20, (8, 1)).astype(np.float32),
        "token_valid": np.arange(32) < rng.integers(28, 33, (8, 1)),
        "boxes": np.sort(rng.uniform(size=(8, 3, 2, 2)), axis=2).reshape(8, 3, 4).astype("float32"),
        "box_valid": np.array([[True, i < 4, False] for i in range(8)]),
        "sam_u8": rng.integers(0, 255, (8, 128, 128, 3), np.uint8),
        "sam_place": np.tile(np.array([0, 20, 128, 108], np.int32), (8, 1)),
    }


SYSTEMS = {
    "lvm": (lvm_task, lvm_batch, "continue"),
    "nxtp": (nxtp_task, nxtp_batch, "one_shot"),
    "nextchat": (nextchat_task, nextchat_batch, "masks"),
}


@functools.cache
def made(name):
    make_task, make_batch, _ = SYSTEMS[name]
    task, rng = make_task(), np.random.default_rng(0)

    def draw(x):
        return rng.normal(0, 0.2, x.shape).astype(x.dtype)

    params = jax.tree.map(draw, jax.eval_shape(task.init, jax.random.key(0)))
    return task, params, make_batch(task)


@functools.cache
def alone(name):
    """What one device predicts from the layout of training."""
    task, params, batch = made(name)
    return {
        key: jax.tree.map(np.asarray, jax.jit(task.predict[key])(params, batch, jax.random.key(0)))
        for key in ("score", SYSTEMS[name][2])
    }


@pytest.mark.parametrize("layout", ["training", "inference"])
@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("name", SYSTEMS)
def test_meshes_and_layouts_predict_alike(name, mesh_name, layout):
    task, params, batch = made(name)
    mesh = sharding.make_mesh(sharding.MeshConfig(*MESHES[mesh_name]))
    shardings = sharding.of_params(mesh, task.sharding_rules, params)
    params = jax.device_put(params, shardings)
    if layout == "inference":
        params = evaluate.for_inference(task, mesh, params)
        shardings = jax.tree.map(lambda x: x.sharding, params)
        split = [x for x in jax.tree.leaves(params) if not x.sharding.is_fully_replicated]
        assert len(split) >= 8  # matrices lie over the mesh
    placed = sharding.place_batch(mesh, batch, np.arange(8), 8)
    for key, expected in alone(name).items():
        predict = jax.jit(
            task.predict[key],
            in_shardings=(shardings, sharding.of_batch(mesh), sharding.replicated(mesh)),
            out_shardings=sharding.replicated(mesh),
        )
        with partition.use_mesh(mesh):
            found = predict(params, placed, jax.random.key(0))
        assert set(found) == set(expected)
        for output, values in expected.items():
            if values.dtype.kind in "ib":
                np.testing.assert_array_equal(found[output], values, output)
            else:
                np.testing.assert_allclose(found[output], values, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_two_processes_predict_as_one(tmp_path):
    """Four devices each, 2x2x2 together, both layouts of the parameters."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = pathlib.Path(__file__).parents[2]
    script = [sys.executable, str(root / "tests" / "systems" / "predict_in_pairs.py")]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    pair = [
        subprocess.Popen(
            [*script, str(rank), str(port), str(tmp_path)], cwd=root, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=500)[0] for process in pair]
    assert all("predicted 2 8" in text for text in said), said[0][-3000:]
    for name in SYSTEMS:
        for key, expected in alone(name).items():
            for layout in ("training", "inference"):
                found = np.load(tmp_path / f"{name}_{key}_{layout}.npz")
                assert set(found) == set(expected)
                for output, values in expected.items():
                    if values.dtype.kind in "ib":
                        np.testing.assert_array_equal(found[output], values, output)
                    else:
                        np.testing.assert_allclose(found[output], values, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_parameter_of_the_layout_has_a_rule(name):
    task, params, _ = made(name)
    abstract = jax.eval_shape(task.inference_params, params)
    assert sharding.match(task.inference_rules, abstract)  # raises for one that has none
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, abstract)]
    assert sizes[0] == sizes[1]


def test_no_copy_of_the_weights_beside_them():
    """The compiler reserves room for the cache, not for the weights once more."""
    cfg = llama.LlamaConfig(264, 256, 8, 1024, 8)
    task = lvm.LvmTask(cfg, codebook_size=256, tokens_per_image=4, context_images=2)
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lvm_batch(task))
    weights = sum(x.size * 4 for x in jax.tree.leaves(params))
    key = jax.eval_shape(lambda: jax.random.key(0))
    for tree in (params, jax.eval_shape(task.inference_params, params)):
        compiled = jax.jit(task.predict["continue"]).lower(tree, batch, key).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < weights / 4
