"""Structured biases, and rows that may read no key, over every implementation."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.test_attention import attend, close, make, plain
from vlm_jax.ops import attention, masks

IMPLEMENTATIONS = ["xla", "blocks", "loop", "cudnn", "splash"]


@pytest.fixture
def how(request, monkeypatch):
    """The name to give to `attend`, with the kernels of other machines made to run here."""
    name = request.param
    if name == "loop":  # the form of `blocks` for long sequences; a last block that is shorter
        monkeypatch.setattr(attention.blocks, "_LONG", 1)
    if name in ("blocks", "loop"):
        monkeypatch.setattr(attention.blocks, "_BLOCK", 4)
        return "blocks"
    if name == "cudnn" and jax.default_backend() != "gpu":
        genuine = jax.nn.dot_product_attention
        monkeypatch.setattr(
            attention.cudnn.jax.nn,
            "dot_product_attention",
            lambda *a, **kw: genuine(*a, **{**kw, "implementation": "xla"}),
        )
    if name == "splash":
        # The TPU kernel, by the interpreter.
        kernel = importlib.import_module(
            "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel"
        )
        make_kernel = kernel.make_splash_mha
        monkeypatch.setattr(
            kernel, "make_splash_mha", lambda *a, **kw: make_kernel(*a, **kw, interpret=True)
        )
    return name


def grid_bias(t, rows=3, cols=4, n=4, b=2):
    rng = np.random.default_rng(3)
    sizes = (b, n, t, rows), (b, n, t, cols)
    return attention.GridBias(*(jnp.asarray(rng.normal(size=x), jnp.float32) for x in sizes))


def spread(bias):
    """The same in the textbook's way, one key at a time."""
    rows, cols = np.asarray(bias.rows_bntr), np.asarray(bias.cols_bntc)
    keys = [rows[..., r] + cols[..., c] for r in range(rows.shape[3]) for c in range(cols.shape[3])]
    return np.stack(keys, axis=-1)


@pytest.mark.parametrize("how", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("scale", [None, 1.0])
def test_grid_bias(how, scale):
    q, k, v = make(t=11, s=12, k=2)
    bias = grid_bias(11)
    out = attend(q, k, v, bias=bias, scale=scale, implementation=how)
    close(out, plain(q, k, v, bias=spread(bias), scale=scale), 4e-6)


@pytest.mark.parametrize("how", ["blocks", "loop", "cudnn", "splash"], indirect=True)
def test_gradients_of_a_grid_bias(how):
    q, k, v = make(t=6, s=12)

    def loss(arrays, implementation):
        q, k, v, bias = arrays
        return jnp.square(attention.attend(q, k, v, bias=bias, implementation=implementation)).sum()

    arrays = q, k, v, grid_bias(6)
    ours, theirs = (jax.jit(jax.grad(loss), static_argnums=1)(arrays, x) for x in (how, "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        close(a, b, 2e-5)


@pytest.mark.parametrize("how", ["xla", "blocks", "loop", "cudnn"], indirect=True)
def test_bucket_bias(how):
    q, k, v = make(t=11, k=2)
    table = np.random.default_rng(4).normal(size=(4, 8)).astype(np.float32)
    buckets = attention.t5_buckets(jnp.arange(11), jnp.arange(11), num_buckets=8, max_distance=9)
    out = attend(q, k, v, bias=attention.BucketBias(table, buckets), scale=1.0, implementation=how)
    close(out, plain(q, k, v, bias=table[:, np.asarray(buckets)][None], scale=1.0))
    causal = dict(causal=True, implementation=how)
    out = attend(q, k, v, bias=attention.BucketBias(table, buckets), **causal)
    close(out, plain(q, k, v, masks.causal(11)[None], table[:, np.asarray(buckets)][None]))


def test_one_query_of_a_cache_reads_with_a_bias():
    q, k, v = make(t=1, s=12, k=2)
    valid = jnp.arange(12) < jnp.array([[9], [12]])
    mask = np.asarray(valid)[:, None] & (np.arange(12) <= 10)
    where = dict(causal=True, q_offset=jnp.int32(10), kv_valid_bs=valid)
    bias = grid_bias(1)
    close(attend(q, k, v, bias=bias, **where), plain(q, k, v, mask, spread(bias)))
    table = np.random.default_rng(4).normal(size=(4, 8)).astype(np.float32)
    buckets = attention.t5_buckets(
        jnp.array([10]), jnp.arange(12), num_buckets=8, max_distance=9, causal=True
    )
    out = attend(q, k, v, bias=attention.BucketBias(table, buckets), **where)
    close(out, plain(q, k, v, mask, table[:, np.asarray(buckets)][None]))
    dense = spread(bias)[:1]
    close(attend(q, k, v, bias_bnts=jnp.asarray(dense), **where), plain(q, k, v, mask, dense))


def test_a_long_grid_never_holds_all_scores():
    # 1 GiB of scores and as much of bias as a whole.
    sizes = (1, 4096, 16, 64), (1, 16, 4096, 64)
    arrays = [jax.ShapeDtypeStruct(sizes[i > 2], "float32") for i in range(5)]

    def run(q, k, v, rows, cols):
        return attention.attend(q, k, v, bias=attention.GridBias(rows, cols))

    forward = jax.jit(run).lower(*arrays).compile().memory_analysis()
    assert forward.temp_size_in_bytes < 256 * 2**20
    gradient = jax.jit(jax.grad(lambda *a: run(*a).sum(), range(5)))
    backward = gradient.lower(*arrays).compile().memory_analysis()
    assert backward.temp_size_in_bytes < 512 * 2**20


def test_t5_buckets_are_those_of_transformers():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch = pytest.importorskip("torch")
    queries, keys = np.arange(0, 400, 7), np.arange(400)
    ahead = torch.tensor(keys[None] - queries[:, None])
    for causal in (False, True):
        for sizes in ((32, 128), (16, 64)):
            expected = t5.T5Attention._relative_position_bucket(ahead, not causal, *sizes).numpy()
            fields = dict(num_buckets=sizes[0], max_distance=sizes[1], causal=causal)
            np.testing.assert_array_equal(attention.t5_buckets(queries, keys, **fields), expected)


def test_t5_buckets_by_hand():
    # Four buckets a side: distances 0 and 1 alone, 2 up to 3, the rest.
    fields = dict(num_buckets=8, max_distance=8)
    row = attention.t5_buckets([4], np.arange(13), **fields)[0]
    assert row.tolist() == [3, 2, 2, 1, 0, 5, 6, 6, 7, 7, 7, 7, 7]


# Structures in which some rows read nothing, as masks are made of them: queries of the first row
# before its first valid key, segments without keys, rows of a dense mask.
SEGMENTS = jnp.array([[1] * 5 + [2] * 4 + [5] * 2, [1] * 9 + [0] * 2])
KEY_SEGMENTS = jnp.array([[1] * 5 + [2] * 6, [3] * 4 + [1] * 7])
VALID = jnp.arange(11) >= jnp.array([[6], [0]])
SOME = jnp.asarray(np.random.default_rng(1).random((2, 11, 11)) < 0.3).at[:, 3].set(False)
TRIANGLE = np.tri(11, dtype=bool)[None]
EMPTY = {
    "padding on the left": (dict(causal=True, kv_valid_bs=VALID), TRIANGLE & VALID[:, None]),
    "no key": (dict(kv_valid_bs=VALID & VALID[::-1] & False), np.zeros((2, 1, 11), bool)),
    "segments": (
        dict(causal=True, q_segments_bt=SEGMENTS, kv_segments_bs=KEY_SEGMENTS),
        TRIANGLE & masks.segments(SEGMENTS, KEY_SEGMENTS),
    ),
    "one document, padding": (
        dict(causal=True, q_segments_bt=SEGMENTS, kv_segments_bs=SEGMENTS, kv_valid_bs=VALID),
        TRIANGLE & masks.segments(SEGMENTS, SEGMENTS) & VALID[:, None],
    ),
    "prefix": (
        dict(causal=True, prefix=3, kv_valid_bs=VALID),
        masks.prefix(11, 3)[None] & VALID[:, None],
    ),
    "mask": (dict(mask_bts=SOME), SOME),
    "causal mask": (dict(causal=True, mask_bts=SOME), TRIANGLE & SOME),
    "cache": (
        dict(causal=True, q_offset=jnp.int32(0), kv_valid_bs=VALID),
        TRIANGLE & VALID[:, None],
    ),
}


@pytest.mark.parametrize("how", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("case", EMPTY)
def test_a_query_without_keys_gets_the_mean_of_all(how, case):
    where, mask = EMPTY[case]
    if how == "splash" and ("mask_bts" in where or "q_offset" in where):
        pytest.skip("a kernel without dense masks and offsets")
    mask = np.broadcast_to(mask, (2, 11, 11))
    empty = ~mask.any(axis=2)
    assert empty.any()
    q, k, v = make(t=11, k=2)
    out, grads = run(q, k, v, how, where)
    close(out, plain(q, k, v, mask), 4e-6)
    mean = np.repeat(np.asarray(v, np.float64).mean(axis=1), 2, axis=1)
    for b, t in np.argwhere(empty):
        close(out[b, t], mean[b], 4e-6)
    assert (np.asarray(grads[0])[empty] == 0).all()
    for a, b in zip(grads, run(q, k, v, "xla", where)[1]):
        close(a, b, 2e-5)


@pytest.mark.parametrize("t", [1, 2])
def test_a_decoding_step_without_keys(t):
    q, k, v = make(t=t, s=6, k=2)
    valid = jnp.array([[False] * 6, [True] * 6])
    where = dict(causal=True, q_offset=jnp.int32(2), kv_valid_bs=valid)
    close(attend(q, k, v, **where), plain(q, k, v, masks.cache(valid, t, 2)))


@pytest.mark.parametrize("case", ["grid", "buckets", "padding on the left"])
def test_cudnn_itself(case):
    """The kernel, where there is one: values against the textbook, gradients against ours."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    q, k, v = make(t=64, n=4, k=2, h=64, dtype=jnp.bfloat16)
    valid = jnp.arange(64) >= jnp.array([[20], [0]])
    table = numbers_like(4, 8)
    buckets = attention.t5_buckets(jnp.arange(64), jnp.arange(64), num_buckets=8)
    grid = jax.tree.map(lambda x: x.astype(jnp.bfloat16), grid_bias(64, rows=8, cols=8))
    where, mask, bias = {
        "grid": (dict(bias=grid), None, spread(jax.tree.map(jnp.float32, grid))),
        "buckets": (
            dict(bias=attention.BucketBias(table, buckets)),
            None,
            np.asarray(table)[:, np.asarray(buckets)][None],
        ),
        "padding on the left": (
            dict(causal=True, kv_valid_bs=valid),
            np.tri(64, dtype=bool) & np.asarray(valid)[:, None],
            0.0,
        ),
    }[case]
    assert attention.choose(q, k, **where) == "cudnn"
    out, grads = run(q, k, v, "cudnn", where)
    close(out.astype(jnp.float32), plain(q, k, v, mask, bias), 2e-2)
    whole = [x.astype(jnp.float32) for x in (q, k, v)]
    for a, b in zip(grads, run(*whole, "blocks", where)[1]):
        assert np.linalg.norm(a.astype(jnp.float32) - b) < 2e-2 * np.linalg.norm(b)


def test_branches_always_read_a_key():
    # Their own: a prefix of padding alone changes nothing.
    q, keys, values = make(t=3, s=7, k=2)
    own_k, own_v = np.random.default_rng(1).normal(size=(2, 2, 3, 2, 4, 8)).astype(np.float32)
    none = jnp.zeros((2, 7), bool)
    out = jax.jit(attention.attend_branches)(
        q, keys, values, own_k, own_v, jnp.int32(2), prefix_valid_bs=none
    )
    for r in range(3):
        mine = (x[:, r, :, :2].swapaxes(1, 2) for x in (own_k, own_v))
        close(out[:, r : r + 1], plain(q[:, r : r + 1], *mine))


def numbers_like(*sizes):
    return jnp.asarray(np.random.default_rng(4).normal(size=sizes), jnp.float32)


def run(q, k, v, how, where):
    def loss(q, k, v):
        out = attention.attend(q, k, v, implementation=how, **where)
        return jnp.square(out).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, grads


def test_errors():
    q, k, v = make(t=5, s=12)
    with pytest.raises(ValueError, match="R \\* C = 12"):
        attend(q, k, v, bias=grid_bias(5, rows=4))
    with pytest.raises(ValueError, match="4 queries|5 queries"):
        attend(q, k, v, bias=grid_bias(4))
    with pytest.raises(ValueError, match="give bias or bias_bnts"):
        attend(q, k, v, bias=grid_bias(5), bias_bnts=jnp.zeros((1, 1, 1, 1)))
    with pytest.raises(ValueError, match="num_buckets"):
        attend(q, k, v, bias=attention.BucketBias(jnp.zeros((3, 8)), jnp.zeros((5, 12), int)))


@pytest.mark.parametrize(
    "platform, dtype, side, expected",
    [
        ("cpu", "float32", 64, "blocks"),
        ("gpu", "bfloat16", 14, "cudnn"),  # 80 + 14 + 14 features
        ("gpu", "bfloat16", 64, "blocks"),
        ("gpu", "float32", 14, "blocks"),
        ("tpu", "bfloat16", 64, "splash"),
    ],
)
def test_choice_for_a_grid(monkeypatch, platform, dtype, side, expected):
    monkeypatch.setattr(attention.partition, "platform", lambda: platform)
    q = jax.ShapeDtypeStruct((1, side * side, 2, 80), dtype)
    terms = jax.ShapeDtypeStruct((1, 2, side * side, side), dtype)
    assert attention.choose(q, q, bias=attention.GridBias(terms, terms)) == expected
