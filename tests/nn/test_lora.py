"""Low-rank additions: beside the kernel, merged into it, trained alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vlm_jax.models import llama
from vlm_jax.nn import functional, linear, lora
from vlm_jax.program import optim
from vlm_jax.weights import convert
from vlm_jax.weights import llama as weights

PLAIN = llama.LlamaConfig(40, 32, 2, 48, 4, num_kv_heads=2)
ALL = dataclasses.replace(PLAIN, lora_rank=3, lora_scale=2.0, lora_modules="q,k,v,o,gate,up,down")
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))


@functools.cache
def started(cfg):
    """Parameters whose B are not zero, so that the additions count."""
    params = functional.flatten(jax.jit(llama.make(cfg).init)(jax.random.key(0)))
    key = jax.random.key(1)
    for path in sorted(params):
        if path.endswith("lora_b"):
            params[path] = 0.3 * jax.random.normal(key, params[path].shape)
    return functional.unflatten(params)


def logits(cfg, params):
    return jax.jit(lambda params: llama.make(cfg).bind(params)(TOKENS).logits)(params)


@pytest.mark.parametrize(
    "spec, sizes, inputs, x_sizes",
    [
        ("btd,df->btf", (6, 5), 1, (2, 3, 6)),
        ("btd,dnh->btnh", (6, 2, 4), 1, (2, 3, 6)),
        ("btnh,nhd->btd", (2, 4, 6), 2, (2, 3, 2, 4)),
        ("rd,df->rf", (6, 5), 1, (3, 6)),  # an axis that is called r
    ],
)
def test_the_product_is_that_of_the_sum(spec, sizes, inputs, x_sizes):
    layer = linear.Linear(nnx.Rngs(0), sizes, inputs=inputs, lora_rank=2, lora_scale=1.5)
    rng = np.random.default_rng(0)
    a = layer.lora_a[...]
    b = rng.normal(size=layer.lora_b.shape).astype(np.float32)
    layer.lora_b[...] = b
    whole = np.asarray(layer.kernel[...]) + 1.5 * np.tensordot(np.asarray(a), b, 1)
    x = rng.normal(size=x_sizes).astype(np.float32)
    np.testing.assert_allclose(layer(spec, x), np.einsum(spec, x, whole), atol=1e-5)
    assert a.shape == (*sizes[:inputs], 2) and b.shape == (2, *sizes[inputs:])


def test_it_starts_as_the_network_without():
    plain, with_lora = (jax.jit(llama.make(c).init)(jax.random.key(0)) for c in (PLAIN, ALL))
    flat = functional.flatten(with_lora)
    for path, x in functional.flatten(plain).items():
        np.testing.assert_array_equal(x, flat[path])
    np.testing.assert_array_equal(logits(PLAIN, plain), logits(ALL, with_lora))
    a = flat["layers/attn/q/lora_a"]
    assert a.shape == (2, 32, 3) and 0.01 < float(a.std()) < 0.03
    assert not np.array_equal(a, flat["layers/attn/k/lora_a"])


def test_which_matrices_have_one():
    paths = functional.flatten(llama.make(dataclasses.replace(PLAIN, lora_rank=3)).abstract())
    found = {path for path in paths if lora.is_addition(path)}
    assert found == {f"layers/attn/{m}/lora_{x}" for m in "qv" for x in "ab"}


@pytest.mark.parametrize("scan", [True, False])
def test_merged_equals_unmerged(scan):
    cfg = dataclasses.replace(ALL, scan_layers=scan)
    params = started(cfg)
    merged, additions = lora.merge(params, cfg.lora_scale)
    plain = dataclasses.replace(PLAIN, scan_layers=scan)
    assert (
        functional.flatten(merged).keys() == functional.flatten(llama.make(plain).abstract()).keys()
    )
    difference = np.abs(logits(cfg, params) - logits(plain, merged)).max()
    assert difference < 1e-5
    without = {k: v for k, v in functional.flatten(params).items() if not lora.is_addition(k)}
    assert np.abs(logits(plain, functional.unflatten(without)) - logits(cfg, params)).max() > 1e-2
    back = functional.flatten(lora.unmerge(merged, additions, cfg.lora_scale))
    for path, x in functional.flatten(params).items():
        np.testing.assert_allclose(back[path], x, atol=1e-6)


def test_the_decode_layout_has_it_merged():
    params = started(ALL)
    decode, cfg = llama.decode_form(params, ALL)
    assert not any(lora.is_addition(path) for path in functional.flatten(decode))
    np.testing.assert_allclose(logits(cfg, decode), logits(ALL, params), atol=1e-5)
    assert llama.decoding_config(decode, ALL) == cfg
    trained, cfg = llama.training_form(decode, cfg)
    np.testing.assert_allclose(logits(cfg, trained), logits(ALL, params), atol=1e-5)
    lying = llama.decoding_config(params, ALL)  # undone
    np.testing.assert_allclose(logits(lying, params), logits(ALL, params), atol=1e-5)


def test_merging_keeps_the_dtype_and_takes_shapes():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), started(ALL))
    merged, _ = lora.merge(half, 2.0)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    shapes, _ = lora.merge(llama.make(ALL).abstract(), 2.0)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, merged)


def test_the_optimizer_trains_nothing_else():
    params = started(ALL)
    learned, frozen = optim.split(params, r"lora_[ab]$")
    assert set(learned) == {path for path in functional.flatten(params) if lora.is_addition(path)}
    optimizer = optim.make_optimizer(optim.OptimConfig(lr=1e-2), 10)

    @jax.jit
    def update(learned, state):
        def loss(learned):
            out = llama.make(ALL).bind(optim.merge(learned, frozen))(TOKENS).logits
            return optax.softmax_cross_entropy_with_integer_labels(out, TOKENS).mean()

        value, grads = jax.value_and_grad(loss)(learned)
        updates, state = optimizer.update(grads, state, learned)
        return value, optax.apply_updates(learned, updates), state

    state, values = optimizer.init(learned), []
    for _ in range(5):
        value, learned, state = update(learned, state)
        values.append(float(value))
    assert values[-1] < values[0] - 0.05
    moments = {x.shape for x in jax.tree.leaves(state) if x.ndim}
    assert moments <= {x.shape for x in learned.values()}


def test_released_weights_fill_the_kernels():
    params = started(PLAIN)
    tensors = {name: load() for name, load in convert.revert(params, weights.HF_RULES).items()}
    read = functional.flatten(weights.from_hf(tensors, ALL))
    assert read.keys() == functional.flatten(params).keys()
    np.testing.assert_array_equal(
        read["layers/attn/q/kernel"], functional.flatten(params)["layers/attn/q/kernel"]
    )
    own = functional.flatten(started(ALL))
    assert functional.flatten(weights.from_native(own, ALL)).keys() == own.keys()


def test_errors():
    params = functional.flatten(started(ALL))
    with pytest.raises(ValueError, match="merge LoRA into the kernels first"):
        convert.revert(started(ALL), weights.HF_RULES)
    half = {path: x for path, x in params.items() if not path.endswith("mlp/up/lora_b")}
    with pytest.raises(ValueError, match="layers/mlp/up/lora_b is missing"):
        lora.merge(functional.unflatten(half), 2.0)
    with pytest.raises(ValueError, match="layers/elsewhere/lora_a belongs to no kernel"):
        lora.unmerge(started(PLAIN), {"layers": {"elsewhere": {"lora_a": np.zeros(1)}}}, 1.0)
    with pytest.raises(ValueError, match="'w' is none of q, k, v"):
        dataclasses.replace(ALL, lora_modules="q,w")
    with pytest.raises(ValueError, match="decode_form merges it"):
        dataclasses.replace(ALL, fused=True, scan_layers=False)
    with pytest.raises(ValueError, match="must not be negative"):
        dataclasses.replace(PLAIN, lora_rank=-1)
