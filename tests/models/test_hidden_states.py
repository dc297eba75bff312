"""Hidden states of every layer, against networks that are cut there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.models import clip, llama, vqgan
from vlm_jax.weights import vqgan as vqgan_weights

TOKENS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
close = np.testing.assert_allclose


def values(network):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), network.abstract())


@pytest.mark.parametrize("form", ["scanned", "listed", "decode"])
def test_llama(form):
    cfg = llama.LlamaConfig(20, 16, 2, 24, 4, num_kv_heads=2, scan_layers=form != "listed")
    params = values(llama.make(cfg))
    own, own_cfg = llama.decode_form(params, cfg) if form == "decode" else (params, cfg)
    valid_bt = jnp.array([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], bool)
    if form == "listed":
        first = {"0": params["layers"]["0"]}
    else:
        first = jax.tree.map(lambda x: x[:1], params["layers"])
    shorter = llama.make(dataclasses.replace(cfg, depth=1))

    @jax.jit
    def run(own, cut):
        network = llama.make(own_cfg).bind(own)
        states = network.hidden_states(TOKENS, valid_bt=valid_bt)
        hidden_btd = network(TOKENS, valid_bt=valid_bt).hidden
        cut_btd = shorter.bind(cut)(TOKENS, valid_bt=valid_bt).hidden
        embedded_btd = network.embed(TOKENS)
        return states, embedded_btd, network.final_norm(states[1]), cut_btd, hidden_btd

    states, embedded_btd, first_btd, cut_btd, hidden_btd = run(own, {**params, "layers": first})
    assert states.shape == (cfg.depth + 1, 2, 5, cfg.width)
    close(states[0], embedded_btd)
    close(first_btd, cut_btd, rtol=2e-5, atol=1e-6)
    close(states[2], hidden_btd, rtol=2e-5, atol=1e-6)


def test_llama_has_either_states_or_a_cache():
    cfg = llama.LlamaConfig(20, 16, 1, 24, 4)

    def run(params):
        cache = llama.make_cache(cfg, 2, 5)
        return llama.make(cfg).bind(params).hidden_states(TOKENS, cache=cache)

    with pytest.raises(ValueError, match="hidden states and attention maps are of whole sequences"):
        jax.eval_shape(run, llama.make(cfg).abstract())


def test_clip():
    cfg = clip.PRESETS["tiny"]
    photos = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)

    @jax.jit
    def run(params):
        network = clip.make(cfg).bind(params)
        cuts = [
            network.vision.tokens(photos, num_blocks=i, post_norm=False)
            for i in range(cfg.vision.depth + 1)
        ]
        words = network.text.hidden_states(TOKENS)
        ends_bd = network.text.final_norm(words[-1])[jnp.arange(2), jnp.argmax(TOKENS, axis=1)]
        made = network.text.projection("bd,de->be", ends_bd)
        return network.vision.hidden_states(photos), cuts, words, made, network.text(TOKENS)

    states, cuts, words, made, embedded = run(values(clip.make(cfg)))
    assert states.shape == (cfg.vision.depth + 1, 2, 1 + cfg.vision.num_patches, cfg.vision.width)
    close(states, jnp.stack(cuts), rtol=1e-5, atol=1e-6)
    assert words.shape == (cfg.text.depth + 1, 2, 5, cfg.text.width)
    close(made, embedded, rtol=1e-5, atol=1e-6)


def test_vqgan():
    cfg, params = vqgan_weights.load("tiny")
    image01 = np.random.default_rng(0).random((1, 64, 64, 3), np.float32)

    @jax.jit
    def run(params):
        network = vqgan.make(cfg).bind(params)
        z_byxc, ids = network.encode_latents(image01), network.encode(image01)
        return network.hidden_states(image01), z_byxc, network.lookup(ids), network.decode(ids)

    states, *expected = run(params)
    levels = len(cfg.channel_mult)
    assert set(states) == {
        "encoder/conv_in",
        *(f"encoder/down/{i}" for i in range(levels)),
        "encoder/mid",
        "encoder/conv_out",
        "latents",
        "codes",
        "decoder/conv_in",
        "decoder/mid",
        *(f"decoder/up/{i}" for i in range(levels)),
        "decoder/norm_out",
        "image01",
    }
    for name, x in zip(("latents", "codes", "image01"), expected):
        close(states[name], x, rtol=1e-5, atol=1e-5)
