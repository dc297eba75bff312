"""The tiny NExT-Chat of the reference, with its inputs and outputs, for several test modules."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import numpy as np

from vlm_jax.systems.nextchat import network, weights
from vlm_jax.weights import readers

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "nextchat"
CFG = network.PRESETS["tiny"]
MASKS = network.PRESETS["tiny_masks"]


@functools.cache
def io() -> dict[str, np.ndarray]:
    """The arrays of the reference's run."""
    return dict(np.load(FOLDER / "io.npz"))


@functools.cache
def texts() -> dict:
    """What is text or a number by name."""
    return json.loads((FOLDER / "text_io.json").read_text())


@functools.cache
def tensors():
    """The checkpoint, by released names."""
    return readers.read(FOLDER / "checkpoint.safetensors")


@functools.cache
def params(cfg=CFG):
    """The checkpoint as our parameters."""
    return weights.from_tensors(tensors(), network.make(cfg).abstract())


@functools.cache
def _jitted(method, cfg):
    net = network.make(cfg)
    return jax.jit(lambda params, *args: getattr(net.bind(params), method)(*args))


def call(method: str, *args, cfg=CFG):
    """A method of the network over the checkpoint."""
    return _jitted(method, cfg)(params(cfg), *args)


def channels_last(images):
    """[B, 3, S, S] -> [B, S, S, 3]."""
    return images.transpose(0, 2, 3, 1)


def boxes_of_rows(boxes, counts):
    """Boxes in text order over a batch -> (float32[B, K, 4], bool[B, K])."""
    found = np.zeros((len(counts), max(counts), 4), np.float32)
    valid = np.zeros(found.shape[:2], bool)
    for row, part in enumerate(np.split(boxes, np.cumsum(counts)[:-1])):
        found[row, : len(part)], valid[row, : len(part)] = part, True
    return found, valid


def close(found, expected, *, scale=1e-4):
    """Equal within the reference's tolerance: scale * max(1, largest value)."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=scale * max(1, np.abs(expected).max()))
