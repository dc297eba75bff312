"""Where parameters start: which source wins, what stays random, and what is said about it."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import checkpoints
from vlm_jax.program import config as config_lib
from vlm_jax.program import starting_point
from vlm_jax.systems import lvm

RANDOM = {"vision": {"w": jnp.zeros(2), "v": jnp.zeros(3)}, "decoder": {"w": jnp.zeros(4)}}


def lay(released=None, task=None, **init):
    """(parameters laid over zeros, how often `released`, the system's weights, were read)."""
    reads = []

    def load_upstream(path, task):
        reads.append(path)
        return released

    init = checkpoints.InitConfig(upstream="weights" if released else "", **init)
    return starting_point.lay_weights(init, task, RANDOM, load_upstream), len(reads)


def saved(workdir, params, **more):
    with checkpoints.Checkpointer(workdir) as saver:
        saver.save(7, {"params": params, **more}, {})
    return str(workdir)


def filled(value, *parts):
    whole = {
        "vision": {"w": jnp.full(2, value), "v": jnp.full(3, value)},
        "decoder": {"w": jnp.full(4, value)},
    }
    return {part: whole[part] for part in parts or whole}


def test_a_run_comes_before_what_the_recipe_starts_from(tmp_path, capfd):
    laid, reads = lay(filled(2.0), run=saved(tmp_path, filled(1.0)))
    assert laid["decoder"]["w"][0] == laid["vision"]["v"][0] == 1 and reads == 0
    said = capfd.readouterr().err
    assert "init.upstream=weights is not read: init.run has every parameter" in said


def test_released_weights_fill_what_a_run_has_not(tmp_path, capfd):
    run = saved(tmp_path, filled(1.0, "vision"))
    laid, _ = lay(filled(2.0), run=run)
    assert laid["vision"]["w"][0] == 1 and laid["decoder"]["w"][0] == 2
    said = capfd.readouterr().err
    assert f"vision: 2 tensors (5 numbers) from init.run={run} (step 7)" in said
    assert "decoder: 1 tensors (4 numbers) from init.upstream=weights" in said


def test_parts_of_the_task_come_last_and_the_rest_is_named(tmp_path, capfd):
    task = types.SimpleNamespace(pretrained=lambda: {"vision": {"w": np.full(2, 3.0)}})
    laid, _ = lay(filled(2.0, "decoder"), task, random="^vision/v$")
    assert laid["vision"]["w"][0] == 3 and laid["vision"]["v"][0] == 0
    said = capfd.readouterr().err
    assert (
        "vision: 1 tensors (2 numbers) from the task's pretrained part, "
        "1 tensors (3 numbers) random" in said
    )
    with pytest.raises(config_lib.ConfigError, match="1 parameters would stay random: vision/v"):
        lay(filled(2.0, "decoder"), task)
    lay()
    assert "decoder: 1 tensors (4 numbers) random" in capfd.readouterr().err


def test_the_moving_average_is_what_a_run_gives(tmp_path, capfd):
    run = saved(tmp_path, filled(1.0), ema={"decoder/w": jnp.full(4, 9.0)})
    laid, _ = lay(run=run)
    assert laid["decoder"]["w"][0] == 9 and laid["vision"]["w"][0] == 1
    assert "(step 7, moving average)" in capfd.readouterr().err
    laid, _ = lay(run=run, averaged=False)
    assert laid["decoder"]["w"][0] == 1


def test_other_shapes_and_names_are_refused(tmp_path):
    with pytest.raises(config_lib.ConfigError, match="has decoder/v, which the model has not"):
        lay({"decoder": {"v": jnp.zeros(1)}})
    with pytest.raises(config_lib.ConfigError, match=r"decoder/w has shape \(5,\), .*needs \(4,\)"):
        lay({"decoder": {"w": jnp.zeros(5)}})


def test_a_run_whose_model_computes_something_else_is_refused():
    model = dict(vocab_size=16, width=8, depth=1, mlp_width=8, num_heads=2, max_tokens=8)
    task = dict(codebook_size=8, tokens_per_image=2, context_images=1)
    ours = {"system": "lvm", "model": model, "task": task}

    def make(config):
        return lvm.make_task(config["model"], **config["task"]), None

    def compare(insist=False, **other):
        init = checkpoints.InitConfig(insist=insist)
        theirs = {"system": "lvm", "model": {**model, **other}}
        starting_point.comparison(init, ours, make)("init.run=R (step 7)", theirs)

    with pytest.raises(config_lib.ConfigError, match=r"init.run=R \(step 7\).*") as refused:
        compare(rms_eps=0.1, dtype="bfloat16")
    assert "model.rms_eps: 0.1 -> (not set)" in str(refused.value)
    assert "dtype" not in str(refused.value) and "init.insist=True" in str(refused.value)
    with pytest.raises(config_lib.ConfigError, match=r"model.rope_theta: 5.0 -> \(not set\)"):
        compare(rope_theta=5.0)
    compare(insist=True, rope_theta=5.0)
    compare(dtype="bfloat16", max_tokens=16, rms_eps=1e-6)  # a default written out
    compare(depth=2, rms_eps=0.1)  # other shapes: said when they are laid
    compare(no_such_field=2)  # of another system
