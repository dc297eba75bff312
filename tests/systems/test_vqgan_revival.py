"""Dead codes: what is measured, what is replaced, and that a collapsed codebook recovers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems import test_vqgan_adversary as shared
from vlm_jax.program import config as config_lib
from vlm_jax.systems import vqgan
from vlm_jax.systems.vqgan import revival


def state_of(book, step=10, share=None):
    codes = len(book)
    return {
        "step": jnp.int32(step),
        "params": {
            "quantize": {"embedding": book},
            "codebook_usage": {
                "share": jnp.ones(codes) if share is None else jnp.asarray(share),
                "revived": jnp.zeros(()),
            },
        },
        "ema": {"quantize/embedding": book + 1, "other": jnp.ones(3)},
        "opt_state": ({"mu": {"quantize/embedding": jnp.full_like(book, 7.0)}, "count": 3},),
    }


def update(state, z, ids, weight, **fields):
    fields = dict(every=5, decay=0.5, floor=0.3) | fields
    return jax.jit(
        lambda state: revival.update(
            state, lambda params: (z, ids, weight), jax.random.key(0), **fields
        )
    )(state)


def test_share_and_replacement_by_hand():
    book = jnp.arange(8.0).reshape(4, 2)
    z = jnp.array([[10.0, 10.0], [20.0, 20.0], [30.0, 30.0], [40.0, 40.0]])
    ids, weight = jnp.array([0, 0, 1, 2]), jnp.array([1.0, 1.0, 1.0, 0.0])
    # The last latent does not count: shares 4 * (2, 1, 0, 0) / 3, averaged half and half with 1,
    # 1, 0.5 and 2. Only code 2 comes under 0.3.
    new = update(state_of(book, share=[1.0, 1.0, 0.5, 2.0]), z, ids, weight)
    usage = new["params"]["codebook_usage"]
    np.testing.assert_allclose(usage["share"], [11 / 6, 7 / 6, 1.0, 1.0], rtol=1e-6)
    assert usage["revived"] == 1
    embedding = np.asarray(new["params"]["quantize"]["embedding"])
    np.testing.assert_array_equal(embedding[[0, 1, 3]], book[jnp.array([0, 1, 3])])
    assert embedding[2, 0] in (10, 20, 30)  # never the latent that does not count
    np.testing.assert_array_equal(new["ema"]["quantize/embedding"][2], embedding[2])
    np.testing.assert_array_equal(new["ema"]["quantize/embedding"][0], book[0] + 1)
    moments = np.asarray(new["opt_state"][0]["mu"]["quantize/embedding"])
    np.testing.assert_array_equal(moments, [[7, 7], [7, 7], [0, 0], [7, 7]])


def test_nothing_happens_between_measurements_or_without_pictures():
    book = jnp.arange(8.0).reshape(4, 2)
    z, ids = jnp.ones((4, 2)), jnp.zeros(4, jnp.int32)
    for state, weight in (
        (state_of(book, step=11, share=[0.0] * 4), jnp.ones(4)),
        (state_of(book, step=10, share=[0.0] * 4), jnp.zeros(4)),
    ):
        new = update(state, z, ids, weight)
        jax.tree.map(np.testing.assert_array_equal, new, state)


def test_dead_codes_get_different_latents():
    book = jnp.zeros((6, 1))
    z = jnp.arange(10.0)[:, None] + 1
    new = update(state_of(book, share=[1.0] + [0.0] * 5), z, jnp.zeros(10, jnp.int32), jnp.ones(10))
    fresh = np.asarray(new["params"]["quantize"]["embedding"])[1:, 0]
    assert len(set(fresh)) == 5 and set(fresh) <= set(range(1, 11))
    again = update(
        state_of(book, share=[1.0] + [0.0] * 5), z, jnp.zeros(10, jnp.int32), jnp.ones(10)
    )
    np.testing.assert_array_equal(fresh, again["params"]["quantize"]["embedding"][1:, 0])


def test_a_frozen_codebook_is_refused():
    state = state_of(jnp.zeros((4, 2))) | {"opt_state": ()}
    with pytest.raises(config_lib.ConfigError, match="needs a codebook that learns"):
        update(state, jnp.ones((4, 2)), jnp.zeros(4, jnp.int32), jnp.ones(4))


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 2])
def test_a_collapsed_codebook_recovers_only_with_revival(every):
    task = vqgan.make_task(
        shared.SMALL, factor_on="commitment", revive_every=every, revive_decay=0.5
    )
    train_step, state = shared.start(task, lr=3e-3)
    # One code at the origin, all others far away: no latent chooses them.
    book = state["params"]["quantize"]["embedding"]
    far = jnp.full_like(book, 100.0).at[0].set(0.0)
    state["params"] = {**state["params"], "quantize": {"embedding": far}}
    batch = shared.batch_of()
    encode = jax.jit(task.predict["encode"])

    def used(params):
        return len(np.unique(encode(params, batch, None)["ids"]))

    assert used(state["params"]) == 1
    losses = []
    for _ in range(30):
        state, metrics = train_step(state, batch, jax.random.key(1))
        losses.append(float(metrics["loss/l1"]))
    assert np.isfinite(losses).all()
    if every:
        assert used(state["params"]) > 16 and metrics["codes/revived"] >= 31
    else:
        assert used(state["params"]) == 1
