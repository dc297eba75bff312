"""Parts of a batch with unequal counts give the loss, gradient and metrics of the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.models import llama
from vlm_jax.ops import losses, partition
from vlm_jax.program import optim, run, sharding, train
from vlm_jax.systems import lvm, nxtp, vqgan
from vlm_jax.systems.nextchat import task as nextchat

ROWS = 8
# Supervised tokens of every row; part j of k has the rows j, j + k, ...: the last of 4 has none.
COUNTS = np.array([6, 1, 3, 0, 6, 2, 5, 0])


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two terms with weights of their own: words, and boxes that few rows have."""

    sharding_rules = ((".*", jax.sharding.PartitionSpec()),)

    def init(self, rng):
        return {"a": {"w": jnp.ones(3)}, "b": {"w": jnp.full(3, 0.5)}}

    def loss(self, params, batch, rng):
        words_bt = jnp.square(batch["x"] * params["a"]["w"].sum() - 1)
        boxes_b = jnp.abs(batch["x"][:, 0] * params["b"]["w"].sum() * params["a"]["w"][0] - 2)
        words = losses.Term((words_bt * batch["weights"]).sum(), batch["weights"].sum())
        boxes = losses.Term((boxes_b * batch["boxes"]).sum(), batch["boxes"].sum(), 0.25)
        count = losses.Term(batch["weights"].sum(), None)
        return {"words": words, "boxes": boxes}, {"count": count, "plain": batch["x"].mean()}


def pair():
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(ROWS, 6)).astype(np.float32),
        "weights": (np.arange(6) < COUNTS[:, None]).astype(np.float32),
        "boxes": np.array([0, 2, 0, 0, 0, 1, 0, 0], np.float32),
    }
    return Pair(), batch


CFG = llama.LlamaConfig(50, 32, 2, 48, 4)


def of_lvm(**fields):
    task = lvm.LvmTask(CFG, codebook_size=40, tokens_per_image=4, **fields)
    rng = np.random.default_rng(1)
    segments = np.ones((ROWS, 6), np.int32)
    return task, {
        "tokens": rng.integers(0, 40, (ROWS, 6)),
        "targets": rng.integers(0, 40, (ROWS, 6)),
        "weights": (np.arange(6) < COUNTS[:, None]).astype(np.float32),
        "segments": segments,
        "positions": np.broadcast_to(np.arange(6), (ROWS, 6)),
    }


def of_nxtp():
    task = nxtp.make_task(
        {"vision": {"preset": "tiny"}, "decoder": {"preset": "tiny"}}, delimiter_id=5
    )
    rng, side = np.random.default_rng(2), task.cfg.vision.image_size
    return task, {
        "image_u8": rng.integers(0, 256, (ROWS, side, side, 3), np.uint8),
        "tokens": rng.integers(0, 60, (ROWS, 6)),
        "targets": rng.integers(0, 60, (ROWS, 6)),
        "weights": (np.arange(6) < COUNTS[:, None]).astype(np.float32),
        "segments": np.ones((ROWS, 6), np.int32),
        "label_positions": np.broadcast_to(np.arange(6), (ROWS, 6)),
    }


def of_vqgan():
    model = {"preset": "tiny", "resolution": 16}
    task = vqgan.make_task(model, l2_weight=0.5)
    image01 = np.random.default_rng(3).uniform(size=(ROWS, 16, 16, 3)).astype(np.float32)
    return task, {"image01": image01, "valid": COUNTS > 1}


def of_nextchat(parts=("vision", "decoder"), **fields):
    """Rows with no location, one in the question, one and two in the answer; a mask or none."""
    model = dict.fromkeys(parts, {"preset": "tiny"})
    task, rng = nextchat.make_task(model, **fields), np.random.default_rng(4)
    cfg, kinds = task.cfg, np.arange(ROWS) % 4
    tokens = rng.integers(3, 400, (ROWS, 30)).astype(np.int32)
    tokens[:, 1:17] = cfg.patch_id
    tokens[kinds == 1, 18:20] = tokens[kinds > 1, 23:25] = cfg.at_id, cfg.boxes_id
    tokens[kinds == 3, 26:28] = cfg.at_id, cfg.boxes_id
    corners = np.sort(rng.uniform(size=(ROWS, 2, 2, 2)), axis=2)
    return task, {
        "image_u8": rng.integers(0, 256, (ROWS, 56, 56, 3), np.uint8),
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": np.tile(np.arange(30) > 20, (ROWS, 1)).astype(np.float32),
        "token_valid": np.ones((ROWS, 30), bool),
        "boxes": corners.reshape(ROWS, 2, 4).astype(np.float32),
        "box_valid": np.stack([kinds > 0, kinds == 3], axis=1),
        "sam_u8": rng.integers(0, 256, (ROWS, 128, 128, 3), np.uint8),
        "sam_place": np.tile(np.array([0, 20, 128, 108]), (ROWS, 1)),
        "masks": np.tile(np.tri(128, dtype=np.uint8), (ROWS, 2, 1, 1)),
        "mask_valid": np.stack([kinds == 2, kinds == 3], axis=1),
    }


CASES = {
    "two terms": pair,
    "lvm": lambda: of_lvm(loss_mean="token"),
    "lvm, chunked rows": lambda: of_lvm(loss_mean="row", loss_chunk=4),
    "nxtp": of_nxtp,
    "nextchat": lambda: of_nextchat(("vision", "decoder", "sam")),
    "nextchat, ordered boxes": lambda: of_nextchat(giou_mean="ordered"),
    "vqgan": of_vqgan,
}


def updated(task, batch, parts, mean="batch", mesh=None):
    """(gradient that the optimizer saw, metrics): plain gradient descent of rate 1."""
    recipe = run.Recipe(
        system="line",
        model={},
        data=None,
        train=train.TrainConfig(steps=10, batch_size=ROWS, accumulate=parts, accumulate_mean=mean),
        optim=optim.OptimConfig(lr=0.1, schedule="constant", clip_norm=0.0),
    )
    sgd = optax.sgd(1.0)
    params = jax.jit(task.init)(jax.random.key(0))
    learned, _ = optim.split(params, ".*")
    state = {"step": jnp.int32(0), "params": params, "opt_state": sgd.init(learned)}
    update = train.make_train_step(task, sgd, recipe)
    if mesh is not None:
        batch = sharding.place_batch(mesh, batch, np.arange(ROWS), ROWS)
        with partition.use_mesh(mesh):
            new, metrics = jax.jit(update)(state, batch, jax.random.key(1))
    else:
        new, metrics = jax.jit(update)(state, batch, jax.random.key(1))
    after, _ = optim.split(new["params"], ".*")
    grads = {path: np.asarray(learned[path] - after[path]) for path in learned}
    return grads, jax.tree.map(np.asarray, metrics)


def assert_same(got, want, rtol=2e-4):
    for path, grad in want[0].items():
        scale = np.abs(grad).max()
        np.testing.assert_allclose(got[0][path], grad, rtol=rtol, atol=rtol * scale + 1e-7)
    assert set(got[1]) == set(want[1])
    for name, value in want[1].items():
        if name not in ("batch_code_perplexity", "latent_rms", "psnr"):  # of every part by itself
            np.testing.assert_allclose(got[1][name], value, rtol=rtol, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.startswith("nextchat") else [])
        for name in CASES
    ],
)
def test_parts_give_what_the_whole_batch_gives(case):
    task, batch = CASES[case]()
    want = updated(task, batch, 1)
    for parts in (4,) if case in ("nxtp", "vqgan") else (2, 4):  # compiling takes long
        assert_same(updated(task, batch, parts), want)


def test_the_mean_of_means_is_another_one_and_a_choice():
    task, batch = of_lvm(loss_mean="token")
    whole, parts = updated(task, batch, 1), updated(task, batch, 4, "parts")
    alone = [updated(task, {k: x[j::4] for k, x in batch.items()}, 1) for j in range(4)]
    want = np.mean([metrics["loss"] for _, metrics in alone])
    np.testing.assert_allclose(parts[1]["loss"], want, rtol=1e-5)
    assert abs(parts[1]["loss"] - whole[1]["loss"]) > 1e-3
    for path, grad in parts[0].items():
        mean = np.mean([grads[path] for grads, _ in alone], axis=0)
        np.testing.assert_allclose(grad, mean, atol=1e-5)
    # Counts are those of the whole batch either way.
    assert parts[1]["scored_tokens"] == whole[1]["scored_tokens"] == COUNTS.sum()


def test_numbers_by_hand():
    task, batch = pair()
    _, metrics = updated(task, batch, 2)
    words = np.square(batch["x"] * 3 - 1)
    words = (words * batch["weights"]).sum() / batch["weights"].sum()
    boxes = np.abs(batch["x"][:, 0] * 1.5 - 2)
    boxes = 0.25 * (boxes * batch["boxes"]).sum() / 3
    np.testing.assert_allclose(metrics["loss/words"], words, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/boxes"], boxes, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], words + boxes, rtol=1e-5)
    assert metrics["count"] == COUNTS.sum()
    np.testing.assert_allclose(metrics["plain"], batch["x"].mean(), rtol=1e-5)


def test_a_term_that_nobody_has_is_zero():
    task, batch = pair()
    batch["boxes"][:] = 0
    grads, metrics = updated(task, batch, 4)
    assert metrics["loss/boxes"] == 0 and np.isfinite(metrics["loss"])
    assert (grads["b/w"] == 0).all()


@pytest.mark.parametrize("case", ["two terms", "lvm"])
def test_devices_with_unequal_counts(case):
    task, batch = CASES[case]()
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))
    assert_same(updated(task, batch, 1, mesh=mesh), updated(task, batch, 1))


def test_the_weights_cost_no_second_forward_pass():
    task, batch = of_lvm(loss_mean="token")

    def flops(mean):
        recipe = run.Recipe(
            system="line",
            model={},
            data=None,
            optim=optim.OptimConfig(lr=0.1),
            train=train.TrainConfig(steps=9, batch_size=ROWS, accumulate=2, accumulate_mean=mean),
        )
        optimizer = optim.make_optimizer(recipe.optim, 10)
        state = jax.eval_shape(lambda: train.init_state(task, optimizer, recipe, jax.random.key(0)))
        update = jax.jit(train.make_train_step(task, optimizer, recipe))
        lowered = update.lower(state, batch, jax.random.key(1))
        return lowered.compile().cost_analysis()["flops"]

    assert flops("batch") < 1.02 * flops("parts")


def test_another_mean_is_refused():
    with pytest.raises(ValueError, match="accumulate_mean='rows' is neither"):
        train.TrainConfig(steps=1, batch_size=1, accumulate_mean="rows")
