"""Schedules, selectors, accumulation, and the reference's optimizer run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn import functional
from vlm_jax.program import optim, run, train
from vlm_jax.weights import llama as llama_weights


def test_schedule_of_the_published_command(golden_lvm):
    golden = np.load(golden_lvm / "io.npz")
    config = optim.OptimConfig(lr=1.5e-4, end_lr=3e-5, warmup_steps=8000, decay_steps=288_000)
    schedule = optim.make_schedule(config, total_steps=100_000)
    got = [float(schedule(step)) for step in golden["sched.steps"]]
    np.testing.assert_allclose(got, golden["sched.lr"], rtol=2e-6, atol=1e-12)


def test_schedule_shapes():
    config = optim.OptimConfig(lr=1.0, end_lr=0.0, schedule="linear", warmup_steps=2)
    schedule = optim.make_schedule(config, total_steps=6)
    assert [float(schedule(i)) for i in range(8)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]
    constant = optim.make_schedule(optim.OptimConfig(lr=0.5, schedule="constant"), 10)
    assert float(constant(0)) == float(constant(9)) == 0.5
    with pytest.raises(ValueError, match="triangle"):
        optim.make_schedule(optim.OptimConfig(schedule="triangle"), 10)
    with pytest.raises(ValueError, match="warmup_steps=20 is longer than train.steps=10"):
        optim.make_schedule(optim.OptimConfig(warmup_steps=20), 10)
    with pytest.raises(ValueError, match="warmup_steps=20 is longer than optim.decay_steps=15"):
        optim.make_schedule(optim.OptimConfig(warmup_steps=20, decay_steps=15), 100)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(lr=-1e-3), "lr=-0.001 must be at least 0"),
        (dict(lr=float("nan")), "lr=nan must be at least 0"),
        (dict(end_lr=float("inf")), "end_lr=inf must be"),
        (dict(warmup_steps=-1), "warmup_steps=-1 must be at least 0"),
        (dict(b2=1.0), "b2=1.0 must be between 0 and 1"),
        (dict(eps=0.0), "eps=0.0 must be positive"),
        (dict(ema=1.5), "ema=1.5 must be between"),
        (dict(clip_norm=-1.0), "clip_norm=-1.0"),
        (dict(lr_scale={"head": "fast"}), "head='fast' must be at least 0"),
        (dict(lr_scale={"(": 1.0}), "lr_scale key=.* is not a regular expression"),
        (dict(trainable="layers/("), "trainable=.* is not a regular expression"),
        (dict(moment_dtype="int8"), "moment_dtype='int8' is none of"),
    ],
)
def test_impossible_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        optim.OptimConfig(**fields)


def test_selectors():
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"scale": jnp.ones(3)}}
    learned, frozen = optim.split(params, "^a/")
    assert set(learned) == {"a/kernel"} and set(frozen) == {"b/scale"}
    assert jax.tree.structure(optim.merge(learned, frozen)) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="matches none of 2 parameters"):
        optim.split(params, "^c/")


def test_only_learned_parameters_have_moments_and_only_kernels_decay():
    config = optim.OptimConfig(
        lr=0.1,
        schedule="constant",
        weight_decay=1.0,
        decay="kernel$",
        clip_norm=0.0,
        lr_scale={"^a/": 0.5},
    )
    optimizer = optim.make_optimizer(config, 10)
    learned = {"a/kernel": jnp.ones(2), "b/kernel": jnp.ones(2), "b/scale": jnp.ones(2)}
    state = optimizer.init(learned)
    sizes = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert sizes == 2 * 6  # two moments of six numbers
    zeros = jax.tree.map(jnp.zeros_like, learned)
    updates, _ = optimizer.update(zeros, state, learned)
    # No gradient: all that moves is decay, lr * weight_decay * parameter, by the group's factor.
    np.testing.assert_allclose(updates["a/kernel"], -0.05)
    np.testing.assert_allclose(updates["b/kernel"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["b/scale"], 0.0)


def test_accumulation_is_the_mean_of_the_parts():
    batch = {"x": jnp.arange(8.0)}
    total = optim.accumulate(lambda b, i: {"mean": b["x"].mean(), "i": i * 1.0}, batch, 4)
    assert float(total["mean"]) == 3.5 and float(total["i"]) == 1.5


def test_eight_micro_steps_of_the_reference(golden_lvm):
    """AdamW, clipping of the mean gradient, decay of everything, first update at rate 0."""
    golden = np.load(golden_lvm / "io.npz")
    cfg, params = llama_weights.load(golden_lvm / "llama.safetensors", _config(golden_lvm))
    from vlm_jax.systems import lvm

    task = lvm.LvmTask(cfg, codebook_size=64, tokens_per_image=64)
    recipe = run.Recipe(
        system="lvm",
        model={},
        train=train.TrainConfig(steps=6, batch_size=8, accumulate=2),
        data=None,
        optim=optim.OptimConfig(
            lr=3e-3, end_lr=3e-4, warmup_steps=2, decay_steps=6, weight_decay=0.1, clip_norm=1.0
        ),
    )
    optimizer = optim.make_optimizer(recipe.optim, 6)
    learned, _ = optim.split(params, ".*")
    state = {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init(learned)}
    step = jax.jit(train.make_train_step(task, optimizer, recipe))

    tokens, masks = golden["train.tokens"], golden["train.loss_masks"]
    losses, lrs = [], []
    for update in range(4):
        # Part j of ours takes rows j, j+2, ...: interleave two micro-batches of the reference.
        rows = tokens[2 * update : 2 * update + 2].swapaxes(0, 1).reshape(8, -1)
        mask = masks[2 * update : 2 * update + 2].swapaxes(0, 1).reshape(8, -1)
        length = rows.shape[1] - 1
        batch = {
            "tokens": rows[:, :-1],
            "targets": rows[:, 1:],
            "weights": (mask[:, 1:] if mask.shape[1] > length else mask).astype(np.float32),
            "segments": np.ones((8, length), np.int32),
            "positions": np.tile(np.arange(length, dtype=np.int32), (8, 1)),
        }
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
        lrs.append(float(metrics["optim/lr"]))
    expected = golden["train.loss"].reshape(4, 2).mean(axis=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(lrs, golden["train.schedule_at_0_to_8"][:4], rtol=1e-6, atol=1e-12)
    final = functional.flatten(state["params"])
    for name, ours in (
        ("final_embed", final["embed/table"]),
        ("final_lm_head", final["lm_head/kernel"].T),
        ("final_l0_ffn_norm", final["layers/mlp_norm/scale"][0]),
        ("final_l0_down_proj", final["layers/mlp/down/kernel"][0].T),
    ):
        np.testing.assert_allclose(ours, golden[f"train.{name}"], atol=2e-5, err_msg=name)


def _config(folder):
    import json

    return llama_weights.config_from_hf(json.loads((folder / "config.json").read_text())["llama"])
