import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops import attention, masks


def attend(q, k, v, *, causal=False, scale=None, implementation=None, prefix=0, **arrays):
    """Jitted: eager dispatch would compile every small operation on its own."""
    fixed = dict(causal=causal, scale=scale, implementation=implementation, prefix=prefix)
    return jax.jit(lambda q, k, v, arrays: attention.attend(q, k, v, **fixed, **arrays))(
        q, k, v, arrays
    )


def make(b=2, t=5, s=None, n=4, k=4, h=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    s = t if s is None else s
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def plain(q, k, v, mask_bts=None, bias=0.0, scale=None):
    """The textbook, in float64, one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            scores = q[b, :, n] @ k[b, :, n // group].T * (scale or q.shape[3] ** -0.5)
            scores = scores + np.broadcast_to(bias, (q.shape[0], q.shape[2], *scores.shape))[b, n]
            if mask_bts is not None:
                scores = np.where(mask_bts[b if len(mask_bts) > 1 else 0], scores, -1e30)
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, n] = probs / probs.sum(-1, keepdims=True) @ v[b, :, n // group]
    return out


def close(a, b, tolerance=2e-6):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def test_by_hand():
    q = jnp.zeros((1, 2, 1, 2))
    v = jnp.array([[1.0, 2.0], [3.0, 6.0]])[None, :, None]
    out = attend(q, q, v, causal=True)
    np.testing.assert_allclose(out[0, :, 0], [[1, 2], [2, 4]])  # the first alone; the mean of both


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(kv_heads):
    q, k, v = make(k=kv_heads)
    close(attend(q, k, v), plain(q, k, v))


def test_causal_in_blocks(monkeypatch):
    monkeypatch.setattr(attention.blocks, "_BLOCK", 4)
    q, k, v = make(t=11, k=2)
    segments = jnp.array([[1] * 5 + [2] * 6, [1] * 9 + [0] * 2])
    mask = masks.causal(11)[None] & masks.segments(segments, segments)
    out = attend(q, k, v, causal=True, q_segments_bt=segments, kv_segments_bs=segments)
    close(out, plain(q, k, v, mask))
    bias = np.random.default_rng(1).normal(size=(1, 4, 11, 11)).astype(np.float32)
    out = attend(q, k, v, causal=True, bias_bnts=bias)
    close(out, plain(q, k, v, masks.causal(11)[None], bias))
    # Gradients do not depend on the blocks.

    def loss(q, k, v):
        return (attend(q, k, v, causal=True) ** 2).sum()

    blocked = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    monkeypatch.setattr(attention.blocks, "_BLOCK", 64)
    for a, b in zip(blocked, jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)):
        close(a, b, 1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 1, 5, 7), (1, 4, 1, 7)])
def test_bias_and_scale(shape):
    q, k, v = make(s=7)
    bias = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    out = attend(q, k, v, bias_bnts=bias, scale=1.0)
    close(out, plain(q, k, v, bias=bias, scale=1.0))


def test_cache_slots():
    q, k, v = make(t=2, s=6)
    valid = jnp.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]], bool)
    out = attend(q, k, v, causal=True, q_offset=jnp.int32(3), kv_valid_bs=valid)
    close(out, plain(q, k, v, masks.cache(valid, 2, 3)))
    one = attend(q[:, :1], k, v, causal=True, q_offset=jnp.int32(3), kv_valid_bs=valid)
    close(one, out[:, :1])


def test_fully_masked_row_is_finite():
    q, k, v = make()
    valid = jnp.array([[False] * 5, [True] * 5])

    def loss(q):
        return attend(q, k, v, causal=True, kv_valid_bs=valid).sum()

    value, grad = jax.value_and_grad(loss)(q)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_low_precision_has_float32_softmax():
    q, k, v = make(t=64, dtype=jnp.bfloat16)
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    close(out.astype(jnp.float32), plain(q, k, v), 2e-2)


def test_prefix_and_dense_mask(monkeypatch):
    monkeypatch.setattr(attention.blocks, "_BLOCK", 4)
    q, k, v = make(t=11, k=2)
    image = masks.prefix(11, 6)  # ends inside a block
    assert image[0, 5] and not image[0, 6]
    close(attend(q, k, v, causal=True, prefix=6), plain(q, k, v, image[None]))
    short = jnp.array([[True] * 11, [True] * 8 + [False] * 3])
    out = attend(q, k, v, causal=True, prefix=6, kv_valid_bs=short)
    close(out, plain(q, k, v, image[None] & short[:, None]))
    some = jnp.asarray(np.random.default_rng(1).random((2, 11, 11)) < 0.5).at[:, :, 0].set(True)
    close(attend(q, k, v, mask_bts=some), plain(q, k, v, some))
    close(
        attend(q, k, v, mask_bts=some[:1], causal=True), plain(q, k, v, some[:1] & masks.causal(11))
    )
    close(attend(q[:, :1], k, v, mask_bts=some[:, :1]), plain(q[:, :1], k, v, some[:, :1]))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("ragged", [False, True])
def test_branches_equal_attention_over_prefix_and_own_keys(kv_heads, ragged):
    branches, used, slots = 3, 2, 4
    q, prefix_k, prefix_v = make(t=branches, s=7, k=kv_heads)
    rng = np.random.default_rng(1)
    own_k, own_v = rng.normal(size=(2, 2, branches, kv_heads, slots, 8)).astype(np.float32)
    valid = jnp.arange(7)[None] < jnp.array([[7], [4 if ragged else 7]])
    out = jax.jit(attention.attend_branches)(
        q, prefix_k, prefix_v, own_k, own_v, jnp.int32(used), prefix_valid_bs=valid
    )
    mask = np.concatenate([valid, np.ones((2, used), bool)], axis=1)[:, None]
    for r in range(branches):
        keys, values = (
            np.concatenate([shared, own[:, r, :, :used].swapaxes(1, 2)], axis=1)
            for shared, own in ((prefix_k, own_k), (prefix_v, own_v))
        )
        close(out[:, r : r + 1], plain(q[:, r : r + 1], keys, values, mask))
    low = (x.astype(jnp.bfloat16) for x in (q, prefix_k, prefix_v, own_k, own_v))
    half = jax.jit(attention.attend_branches)(*low, jnp.int32(used), prefix_valid_bs=valid)
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), out, 3e-2)


def test_branches_with_scores_far_apart():
    # The merge must not overflow where one part outweighs the other by far.
    q = jnp.ones((1, 1, 1, 4))
    v = jnp.zeros((1, 2, 1, 4))
    for far in (-200.0, 200.0):
        out = attention.attend_branches(
            q, v + far, v, jnp.zeros((1, 1, 1, 1, 4)), jnp.ones((1, 1, 1, 1, 4)), jnp.int32(1)
        )
        np.testing.assert_allclose(out, 1.0 if far < 0 else 0.0, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    ["plain", "causal", "segments", "cache", "bias", "masked row", "prefix", "mask"],
)
def test_the_library_and_ours_agree(case):
    q, k, v = make(t=5, s=5, n=4, k=2)
    segments = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 2, 2]])
    where = {
        "plain": {},
        "causal": dict(causal=True),
        "segments": dict(causal=True, q_segments_bt=segments, kv_segments_bs=segments),
        "cache": dict(causal=True, q_offset=jnp.int32(0), kv_valid_bs=segments > 0),
        "bias": dict(causal=True, bias_bnts=jnp.arange(100.0).reshape(1, 4, 5, 5) / 50),
        "masked row": dict(kv_valid_bs=jnp.array([[False] * 5, [True] * 5])),
        "prefix": dict(causal=True, prefix=3),
        "mask": dict(mask_bts=masks.segments(segments, segments)),
    }[case]

    def loss(q, how):
        return (attend(q, k, v, implementation=how, **where) ** 2).sum()

    for a, b in zip(*(jax.value_and_grad(loss)(q, how) for how in ("xla", "blocks"))):
        close(a, b, 1e-5)
        assert np.isfinite(a).all()


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "causal",
        "width 100",
        "segments",
        "padding",
        "prefix",
        "mask",
        "bias",
        "bias of keys",
    ],
)
def test_cudnn_on_a_gpu(case):
    """Values against the textbook, gradients against our float32 path."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    t = 64
    q, k, v = make(t=t, n=4, k=2, h=100 if case == "width 100" else 64, dtype=jnp.bfloat16)
    segments = jnp.asarray(np.random.default_rng(1).integers(1, 4, (2, t)).astype(np.int32)).sort()
    valid = jnp.arange(t) < jnp.array([[t], [t - 5]])
    some = jnp.asarray(np.random.default_rng(1).random((1, t, t)) < 0.5).at[:, :, 0].set(True)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, t, t)), jnp.bfloat16)
    causal = dict(causal=True)
    where, dense = {
        "plain": ({}, None),
        "causal": (causal, masks.causal(t)[None]),
        "width 100": (causal, masks.causal(t)[None]),
        "segments": (
            dict(causal=True, q_segments_bt=segments, kv_segments_bs=segments),
            masks.causal(t)[None] & masks.segments(segments, segments),
        ),
        "padding": (dict(kv_valid_bs=valid), jnp.broadcast_to(valid[:, None], (2, t, t))),
        "prefix": (dict(causal=True, prefix=20), masks.prefix(t, 20)[None]),
        "mask": (dict(mask_bts=some), some),
        "bias": (dict(bias_bnts=bias), None),
        "bias of keys": (dict(bias_bnts=bias[:1, :1, :1]), None),
    }[case]
    assert attention.choose(q, k, **where) == "cudnn"
    expected = plain(q, k, v, dense, np.asarray(where.get("bias_bnts", 0.0), np.float64))
    close(attend(q, k, v, **where).astype(jnp.float32), expected, 2e-2)

    def loss(qkv, how):
        return jnp.square(attend(*qkv, implementation=how, **where).astype(jnp.float32)).mean()

    low = jax.grad(loss)((q, k, v), "cudnn")
    full = jax.grad(loss)([x.astype(jnp.float32) for x in (q, k, v)], "blocks")
    for a, b in zip(low, full):
        assert np.linalg.norm(a.astype(jnp.float32) - b) < 2e-2 * np.linalg.norm(b)


def test_errors():
    q, k, v = make(n=4, k=3)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        attend(q, k, v)
    q, k, v = make()
    with pytest.raises(ValueError, match="both"):
        attend(q, k, v, q_segments_bt=jnp.ones((2, 5), int))
    with pytest.raises(ValueError, match="q_offset was given as well"):
        attend(q, k, v, causal=True, prefix=2, q_offset=1)
    with pytest.raises(ValueError, match="'flash9'"):
        attend(q, k, v, implementation="flash9")


@pytest.mark.parametrize(
    "platform, dtype, h, expected",
    [
        ("cpu", "bfloat16", 64, "blocks"),
        ("gpu", "float32", 64, "xla"),
        ("gpu", "bfloat16", 100, "cudnn"),
        ("gpu", "bfloat16", 256, "xla"),
        ("tpu", "bfloat16", 100, "splash"),
    ],
)
def test_choice(monkeypatch, platform, dtype, h, expected):
    monkeypatch.setattr(attention.partition, "platform", lambda: platform)
    q = jax.ShapeDtypeStruct((1, 256, 2, h), dtype)
    assert attention.choose(q, q) == expected
    assert attention.choose(q, q, q_offset=3) == ("blocks" if platform == "cpu" else "xla")
    one = jax.ShapeDtypeStruct((1, 1, 2, h), dtype)
    assert attention.choose(one, q) == "blocks"
    assert attention.choose(q, q, prefix=7) == expected
    mask = jax.ShapeDtypeStruct((1, 256, 256), "bool")
    dense = attention.choose(q, q, mask_bts=mask)
    assert dense == ("xla" if expected == "splash" else expected)


def test_cudnn_takes_a_bias_of_its_dtype_alone(monkeypatch):
    monkeypatch.setattr(attention.partition, "platform", lambda: "gpu")
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), "bfloat16")
    for dtype, expected in (("bfloat16", "cudnn"), ("float32", "xla")):
        bias = jax.ShapeDtypeStruct((1, 2, 256, 256), dtype)
        assert attention.choose(q, q, bias_bnts=bias) == expected


def test_cudnn_gets_padded_heads_no_causal_mask_and_the_true_scale(monkeypatch):
    calls = []

    def stand_in(q, k, v, *, bias, mask, scale, is_causal, implementation):
        calls.append((q.shape, mask, scale, is_causal, implementation))
        return jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=mask, scale=scale, is_causal=is_causal
        )

    genuine = jax.nn.dot_product_attention
    monkeypatch.setattr(
        attention.cudnn.jax.nn,
        "dot_product_attention",
        lambda *args, **kw: (
            genuine(*args, **kw) if "implementation" not in kw else stand_in(*args, **kw)
        ),
    )
    q, k, v = make(t=6, h=10)
    out = attend(q, k, v, causal=True, implementation="cudnn")
    assert calls == [((2, 6, 4, 16), None, 10**-0.5, True, "cudnn")]
    close(out, plain(q, k, v, masks.causal(6)[None]))
    valid = jnp.array([[0, 1, 1, 1, 1, 1], [1] * 6], bool)
    out = attend(q, k, v, kv_valid_bs=valid, implementation="cudnn")
    assert calls[1][1].shape == (2, 1, 6, 6)  # cuDNN does not broadcast over queries
    close(out, plain(q, k, v, valid[:, None]))
    out = attend(q, k, v, causal=True, prefix=3, implementation="cudnn")
    assert calls[2][1].shape == (1, 1, 6, 6) and not calls[2][3]
    close(out, plain(q, k, v, masks.prefix(6, 3)[None]))


@pytest.mark.parametrize("case", ["plain", "segments", "padding", "prefix"])
def test_splash_interpreted(monkeypatch, case):
    # The TPU kernel, run by the interpreter: padding, scale, segments and grouped heads.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    genuine = kernel.make_splash_mha
    monkeypatch.setattr(
        kernel, "make_splash_mha", lambda *a, **kw: genuine(*a, **kw, interpret=True)
    )
    q, k, v = make(t=130, n=2, k=1, h=10)
    where = dict(causal=True)
    if case == "segments":
        segments = jnp.array([[1] * 60 + [2] * 70, [1] * 100 + [0] * 30])
        where.update(q_segments_bt=segments, kv_segments_bs=segments)
    if case == "padding":
        where.update(kv_valid_bs=jnp.arange(130)[None] < jnp.array([[130], [90]]))
    if case == "prefix":
        where.update(prefix=70, kv_valid_bs=jnp.arange(130)[None] < jnp.array([[130], [90]]))
    out = attend(q, k, v, implementation="splash", **where)
    close(out, attend(q, k, v, implementation="xla", **where), 1e-5)
