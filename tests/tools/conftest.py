"""Runs that were never trained: a checkpoint of random parameters, as training leaves it."""

import jax
import numpy as np
import pytest

from vlm_jax import checkpoints
from vlm_jax import task as task_lib

CONFIGS = {
    "lvm": dict(
        model=dict(preset="lvm_debug", vocab_size=40, width=32, depth=2, mlp_width=48, num_heads=2),
        task=dict(codebook_size=32),
    ),
    "vqgan": dict(model=dict(preset="tiny", channel_mult=(1, 2), hidden_channels=8)),
    "nxtp": dict(
        model=dict(vision=dict(preset="tiny"), decoder=dict(preset="tiny", tie_embeddings=True)),
        task=dict(delimiter_id=5),
    ),
}


@pytest.fixture
def make_run(tmp_path):
    """(system, parameters to change) -> (work directory, the task, its parameters)."""

    def make(system, **parts):
        config = {"system": system, **CONFIGS[system]}
        task = task_lib.resolve(system, "systems").make_task(
            config["model"], **config.get("task", {})
        )
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes) | parts
        workdir = tmp_path / f"run_{system}"
        with checkpoints.Checkpointer(workdir) as saver:
            saver.save(7, {"params": params}, {"config": config})
        return workdir, task, params

    return make
