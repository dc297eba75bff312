"""Every system learns two examples by heart and says them; in bfloat16 nearly as in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.test_accumulation import of_lvm, of_nxtp, of_vqgan
from vlm_jax.models import llama
from vlm_jax.ops import losses
from vlm_jax.systems import lvm, nxtp


def learned(task, batch, updates, lr=1e-2):
    """(parameters, first and last loss) of plain Adam."""
    optimizer = optax.adam(lr)
    params = jax.jit(task.init)(jax.random.key(0))

    def update(state, _):
        params, moments = state
        loss, grads = jax.value_and_grad(
            lambda params: losses.numbers(task.loss(params, batch, None))[0]
        )(params)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), loss

    @jax.jit
    def run(params):
        state = params, optimizer.init(params)
        (params, _), values = jax.lax.scan(update, state, None, length=updates)
        return params, values

    params, values = run(params)
    return params, float(values[0]), float(values[-1])


def test_lvm_continues_two_sentences():
    cfg = llama.LlamaConfig(40, 32, 2, 48, 4, max_tokens=32)
    task = lvm.LvmTask(cfg, codebook_size=32, tokens_per_image=4, context_images=1, temperature=0.0)
    # The same first image, told apart by the id in front of it; the answers differ.
    first, answers = [1, 2, 3, 4], [[9, 30, 2, 17], [5, 5, 21, 8]]
    rows = np.array([[lead, *first, *answer] for lead, answer in zip((32, 33), answers)], np.int32)
    tokens = rows[:, :-1]
    batch = {
        "tokens": tokens,
        "targets": rows[:, 1:],
        "weights": np.tile(np.arange(8) >= 4, (2, 1)).astype(np.float32),
        "segments": np.ones(tokens.shape, np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
    }
    params, before, after = learned(task, batch, 120)
    assert before > 3 and after < 0.01
    made = jax.jit(task.predict["continue"])(params, batch, jax.random.key(1))
    np.testing.assert_array_equal(made["ids"], answers)
    np.testing.assert_array_equal(made["token_match"], [1, 1])


def test_nxtp_names_what_is_in_two_photos():
    task = nxtp.make_task(
        dict(vision=dict(preset="tiny"), decoder=dict(preset="tiny")),
        k=2, max_tokens=3, delimiter_id=5,
    )  # fmt: skip
    side = task.cfg.vision.image_size
    images_u8 = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    image_id, bos = task.cfg.image_id, 1
    # Prompt, then two labels of one or two tokens, each ended by the delimiter.
    rows = np.array([[image_id, bos, 7, 8, 5, 9, 10, 5], [image_id, bos, 20, 5, 21, 22, 5, 0]])
    segments = np.array([[1, 1, 2, 2, 2, 3, 3, 3], [1, 1, 2, 2, 3, 3, 3, 0]], np.int32)
    places = np.array([[0, 1, 2, 3, 4, 2, 3, 4], [0, 1, 2, 3, 2, 3, 4, 0]], np.int32)
    tokens = np.where(segments > 0, rows, task.cfg.empty_id).astype(np.int32)
    targets, weights = np.zeros((2, 8), np.int32), np.zeros((2, 8), np.float32)
    for row in range(2):
        for place in range(1, 7):
            if segments[row, place + 1] == segments[row, place] > 0 or place == 1:
                targets[row, place], weights[row, place] = rows[row, place + 1], 1
    batch = {
        "image_u8": images_u8, "tokens": tokens, "targets": targets, "weights": weights,
        "segments": segments, "label_positions": places, "prompt": tokens[:, :2],
    }  # fmt: skip
    params, before, after = learned(task, batch, 200, lr=3e-3)
    # Two labels begin at one place; which comes first is drawn, what is scored is the first.
    assert before > 3 and after < 0.05
    found = jax.jit(task.predict["one_shot"])(params, batch, jax.random.key(1))
    assert found["ids"][0, 0, :3].tolist() == [7, 8, 5]
    assert found["ids"][1, 0, :2].tolist() == [20, 5]
    assert found["probs"][:, 0, 0].min() > 0.9


@pytest.mark.parametrize(
    "make", [lambda: of_lvm(loss_mean="token"), of_nxtp, of_vqgan], ids=["lvm", "nxtp", "vqgan"]
)
def test_the_loss_in_bfloat16(make):
    """Within 1 % of float32."""
    task, batch = make()
    params = jax.jit(task.init)(jax.random.key(0))

    def loss(task):
        return float(
            jax.jit(lambda params: losses.numbers(task.loss(params, batch, None))[0])(params)
        )

    def low(cfg):
        parts = {
            field.name: low(value)
            for field in dataclasses.fields(cfg)
            if dataclasses.is_dataclass(value := getattr(cfg, field.name))
        }
        return dataclasses.replace(cfg, **(parts or {"dtype": "bfloat16"}))

    other = dataclasses.replace(task, cfg=low(task.cfg))
    exact, rounded = loss(task), loss(other)
    assert exact != rounded  # it does compute in another precision
    assert abs(rounded - exact) < 0.01 * abs(exact), (exact, rounded)
    assert jnp.isfinite(rounded)
