"""Attention and MLP of blocks against the formulas, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm_jax.nn import attention, functional, lora, mlp, perceptron
from vlm_jax.ops import attention as ops
from vlm_jax.ops import rope


def numbers(*sizes, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes), jnp.float32)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def written_out(layer, x, keys=None, values=None, scale=None, bias=0.0, edit=lambda q, k: (q, k)):
    """One head at a time, float64."""
    keys = x if keys is None else keys
    values = keys if values is None else values

    def read(p):
        return np.asarray(p[...], np.float64)

    def project(linear, x):
        y = np.einsum("btd,dnh->btnh", np.asarray(x, np.float64), read(linear.kernel))
        return y if linear.bias is None else y + read(linear.bias)

    q, k = edit(project(layer.q, x), project(layer.k, keys))
    v = project(layer.v, values)
    group = q.shape[2] // k.shape[2]
    heads = []
    for n in range(q.shape[2]):
        scores = np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, n // group])
        scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
        bias_bts = np.broadcast_to(bias, (len(q), q.shape[2], *scores.shape[1:]))[:, n]
        heads.append(softmax(scores + bias_bts) @ v[:, :, n // group])
    y = np.einsum("btnh,nhd->btd", np.stack(heads, axis=2), read(layer.o.kernel))
    return y if layer.o.bias is None else y + read(layer.o.bias)


def with_biases(layer):
    for i, linear in enumerate((layer.q, layer.k, layer.v, layer.o)):
        if linear.bias is not None:
            linear.bias[...] = numbers(*linear.bias.shape, seed=10 + i)
    return layer


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(bias="qkvo"),
        dict(bias="qvo"),  # EVA-02
        dict(kv_heads=2, head_width=6),
        dict(score_scale=1.0),  # T5
    ],
    ids=str,
)
def test_self_attention(fields):
    layer = with_biases(attention.Attention(nnx.Rngs(0), 16, 4, scale=0.3, **fields))
    x = numbers(2, 5, 16)
    wanted = written_out(layer, x, scale=fields.get("score_scale"))
    np.testing.assert_allclose(layer(x), wanted, atol=2e-5)
    names = {n for n in "qkvo" if getattr(layer, n).bias is not None}
    assert names == set(fields.get("bias", ""))


def test_cross_attention_to_keys_and_values_of_their_own():
    # SAM's two-way transformer: positions are in the keys and not in the values.
    layer = attention.Attention(nnx.Rngs(0), 16, 2, head_width=4, kv_width=10, scale=0.3)
    x, keys, values = numbers(2, 3, 16), numbers(2, 7, 10, seed=1), numbers(2, 7, 10, seed=2)
    assert layer.k.kernel.shape == (10, 2, 4) and layer.o.kernel.shape == (2, 4, 16)
    np.testing.assert_allclose(
        layer(x, keys, values), written_out(layer, x, keys, values), atol=2e-5
    )
    np.testing.assert_allclose(layer(x, keys), written_out(layer, x, keys), atol=2e-5)


def test_normalised_and_rotated_heads():
    layer = attention.Attention(nnx.Rngs(0), 16, 2, qk_norm_eps=1e-6, scale=0.3)
    layer.q_norm.scale[...], layer.k_norm.scale[...] = numbers(8, seed=3), numbers(8, seed=4)
    angles = rope.table(jnp.arange(5)[None], 8)

    def rotate(x):
        return rope.rotate(x, *angles)

    def normed(x, scale):
        root = np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
        return np.asarray(rotate(jnp.asarray(x / root * np.asarray(scale[...]), jnp.float32)))

    x = numbers(2, 5, 16)
    wanted = written_out(
        layer, x, edit=lambda q, k: (normed(q, layer.q_norm.scale), normed(k, layer.k_norm.scale))
    )
    np.testing.assert_allclose(layer(x, rotate=rotate), wanted, atol=2e-5)


def test_a_structured_bias_and_a_mask_pass():
    layer = attention.Attention(nnx.Rngs(0), 16, 4, score_scale=1.0, scale=0.3)
    x, table = numbers(2, 5, 16), numbers(4, 8, seed=1)
    buckets = ops.t5_buckets(jnp.arange(5), jnp.arange(5), num_buckets=8, max_distance=4)
    out = layer(x, bias=ops.BucketBias(table, buckets))
    wanted = written_out(layer, x, scale=1.0, bias=np.asarray(table)[:, np.asarray(buckets)][None])
    np.testing.assert_allclose(out, wanted, atol=2e-5)
    hidden = np.where(np.tri(5, dtype=bool), 0.0, -np.inf)
    np.testing.assert_allclose(
        layer(x, causal=True), written_out(layer, x, scale=1.0, bias=hidden), atol=2e-5
    )


def test_a_step_through_a_cache_is_a_call_by_pieces():
    layer = attention.Attention(nnx.Rngs(0), 16, 4, score_scale=0.7, scale=0.3)
    x, seen = numbers(2, 5, 16), {}

    def attend(q, k, v, **where):
        seen.update(where, sizes=(q.shape, k.shape))
        return ops.attend(q, k, v, causal=True, **where), "state"

    out, state = layer.step(x, attend)
    assert state == "state" and seen == dict(scale=0.7, sizes=((2, 5, 4, 4),) * 2)
    np.testing.assert_allclose(out, layer(x, causal=True), atol=1e-6)
    k, v = layer.keys_values(x)
    o = ops.attend(layer.queries(x[:, 2:3]), k, v, scale=0.7)
    np.testing.assert_allclose(layer.merge(o), layer(x)[:, 2:3], atol=1e-6)


def test_attention_has_the_additions_it_is_asked_for():
    fields = dict(lora=lora.Lora(2, 1.0, ("q", "o")))
    network = functional.Functional(lambda rngs: attention.Attention(rngs, 16, 4, **fields))
    paths = {path: x.shape for path, x in functional.flatten(network.abstract()).items()}
    assert {path for path in paths if "lora" in path} == {
        f"{m}/lora_{x}" for m in "qo" for x in "ab"
    }
    assert paths["o/lora_a"] == (4, 4, 2) and paths["o/lora_b"] == (2, 16)


ACTIVATIONS = {  # at -1, 0.5, 2
    "relu": [0.0, 0.5, 2.0],
    "silu": [-0.26894142, 0.31122967, 1.76159416],
    "gelu": [-0.15865525, 0.34573123, 1.95449974],
    "gelu_tanh": [-0.15880801, 0.34571401, 1.95459769],
    "quick_gelu": [-0.15420423, 0.35038844, 1.93565862],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    layer = mlp.Mlp(nnx.Rngs(0), 3, 3, name)
    layer.up.kernel[...] = layer.down.kernel[...] = jnp.eye(3)
    x = jnp.array([[[-1.0, 0.5, 2.0]]])
    np.testing.assert_allclose(layer(x)[0, 0], ACTIVATIONS[name], atol=1e-6)


@pytest.mark.parametrize("sizes", [(2, 16), (2, 5, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_gated_mlp(sizes, norm_eps):
    layer = mlp.Mlp(
        nnx.Rngs(0), 16, 12, "silu", gated=True, bias=True, norm_eps=norm_eps, scale=0.3
    )
    for i, linear in enumerate((layer.gate, layer.up, layer.down)):
        linear.bias[...] = numbers(*linear.bias.shape, seed=i)

    def apply(linear, x):
        return x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])

    x = np.asarray(numbers(*sizes))
    gate = apply(layer.gate, x)
    hidden = gate / (1 + np.exp(-gate)) * apply(layer.up, x)
    if norm_eps:
        mean, deviation = hidden.mean(-1, keepdims=True), hidden.var(-1, keepdims=True)
        hidden = (hidden - mean) / np.sqrt(deviation + norm_eps)
    np.testing.assert_allclose(layer(x), apply(layer.down, hidden), atol=2e-5)


@pytest.mark.parametrize("torch_start", [False, True])
def test_perceptron(torch_start):
    layer = perceptron.Perceptron(nnx.Rngs(0), (6, 50, 40, 3), "relu", torch_start=torch_start)
    x = np.asarray(numbers(2, 5, 6))
    wanted = x
    for i, linear in enumerate(layer.layers):
        kernel, bias = np.asarray(linear.kernel[...]), np.asarray(linear.bias[...])
        wanted = (np.maximum(wanted, 0) if i else wanted) @ kernel + bias
        bound = len(kernel) ** -0.5
        if torch_start:  # of a uniform distribution: its edges are reached
            assert 0.95 * bound < np.abs(kernel).max() <= bound and 0 < np.abs(bias).max() <= bound
        else:
            assert kernel.std() == pytest.approx(0.02, rel=0.25) and not bias.any()
    np.testing.assert_allclose(layer(x), wanted, atol=1e-6)
    half = perceptron.Perceptron(nnx.Rngs(0), (6, 3), "gelu", dtype="bfloat16")
    assert half(x).dtype == jnp.bfloat16 and layer(x[0, 0]).shape == (3,)


def test_errors():
    with pytest.raises(ValueError, match="'swish' is none of"):
        mlp.Mlp(nnx.Rngs(0), 4, 4, "swish")
    with pytest.raises(ValueError, match="'tanh' is none of"):
        perceptron.Perceptron(nnx.Rngs(0), (4, 4), "tanh")
    with pytest.raises(ValueError, match="width 10 is not a multiple of num_heads 4"):
        attention.Attention(nnx.Rngs(0), 10, 4)
    with pytest.raises(ValueError, match="not stacked"):
        mlp.Mlp(nnx.Rngs(0), 4, 4, "relu", norm_eps=1e-5, stack=(2,))


def test_low_precision_stays():
    layer = attention.Attention(nnx.Rngs(0), 16, 4, bias="qkvo", lora=lora.Lora(2))
    x = numbers(2, 5, 16).astype(jnp.bfloat16)
    assert layer(x).dtype == mlp.Mlp(nnx.Rngs(0), 16, 8, "gelu")(x).dtype == jnp.bfloat16
    assert jax.tree.leaves(nnx.state(layer))[0].dtype == jnp.float32
