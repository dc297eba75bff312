import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.decoding import sampling

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2]]))


def probs(**kwargs):
    sampler = sampling.Sampler(**kwargs)
    return np.asarray(jax.jit(lambda x: jax.nn.softmax(sampler.warp(x)))(LOGITS))[0]


def test_reference_distributions(golden_lvm):
    io = np.load(golden_lvm / "io.npz")
    names = [name for name in io if name.startswith("warp.probs_")]
    assert len(names) == 4
    for name in names:
        t, k, p = map(float, re.fullmatch(r"warp\.probs_t(.*)_k(.*)_p(.*)", name).groups())
        sampler = sampling.Sampler(temperature=t, top_k=int(k), top_p=p, suppress_from=64)
        got = jax.jit(lambda x, sampler=sampler: jax.nn.softmax(sampler.warp(x)))(io["warp.logits"])
        np.testing.assert_allclose(got, io[name], atol=1e-5, err_msg=name)


def test_by_hand():
    np.testing.assert_allclose(probs(), [0.1, 0.4, 0.3, 0.2], rtol=1e-5)
    np.testing.assert_allclose(probs(top_k=2), [0, 4 / 7, 3 / 7, 0], rtol=1e-5)
    np.testing.assert_allclose(probs(top_p=0.5), [0, 4 / 7, 3 / 7, 0], rtol=1e-5)
    np.testing.assert_allclose(probs(top_p=0.01), [0, 1, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(probs(temperature=0.5), np.square([1, 4, 3, 2]) / 30, rtol=1e-5)
    np.testing.assert_allclose(probs(suppress_from=2), [0.2, 0.8, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(probs(suppress_ids=(1, 3)), [0.25, 0, 0.75, 0], rtol=1e-5)


def test_order():
    # top-p counts the mass that top-k left: 0.4 / 0.7 alone reaches 0.55.
    np.testing.assert_allclose(probs(top_k=2, top_p=0.55), [0, 1, 0, 0], rtol=1e-5)
    # top-k counts what suppression left.
    np.testing.assert_allclose(probs(suppress_ids=(1,), top_k=1), [0, 0, 1, 0], rtol=1e-5)
    # top-p sees the heated distribution: the smallest has 0.163 of it, before heating 0.1.
    assert probs(temperature=2.0, top_p=0.85)[0] > 0
    assert probs(top_p=0.85)[0] == 0


def test_draws():
    rows = jnp.tile(LOGITS, (4000, 1))
    draw = jax.jit(sampling.Sampler(suppress_ids=(2,)).__call__)
    first = draw(jax.random.key(0), rows)
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(first, draw(jax.random.key(0), rows))
    assert (first != draw(jax.random.key(1), rows)).any()
    np.testing.assert_allclose(np.bincount(first) / 4000, np.array([1, 4, 0, 2]) / 7, atol=0.03)
    greedy = sampling.Sampler(temperature=0, suppress_from=1)
    assert greedy(jax.random.key(0), LOGITS)[0] == 0
    assert sampling.GREEDY(jax.random.key(0), LOGITS)[0] == 1


@pytest.mark.parametrize(
    "field", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5)]
)
def test_impossible_values(field):
    ((name, value),) = field.items()
    with pytest.raises(ValueError, match=f"{name} {value}"):
        sampling.Sampler(**field)


@pytest.mark.parametrize("top_k", [0, 1, 5, 63, 64, 100])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 1.0), (1.3, 0.6)])
def test_traced_numbers_draw_the_same_tokens(temperature, top_k, top_p):
    logits = jax.random.normal(jax.random.key(1), (5, 64)) * 4
    logits = logits.at[:, 3].set(logits[:, 7]).at[0, :9].set(0.0).at[1, 2].set(-jnp.inf)
    sampler = sampling.Sampler(temperature, top_k, top_p, suppress_from=60, suppress_ids=(2,))
    bare = sampling.Sampler(suppress_from=60, suppress_ids=(2,))
    for seed in range(20):
        rng = jax.random.key(seed)
        expected = sampler(rng, logits)
        np.testing.assert_array_equal(_draw(bare, sampler.knobs, rng, logits), expected)


_draw = jax.jit(sampling.Sampler.draw, static_argnums=0)


def test_other_numbers_compile_nothing():
    traced = []

    @jax.jit
    def draw(knobs, rng, logits):
        traced.append(1)
        return sampling.Sampler().draw(knobs, rng, logits)

    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.0, 5, 0.5), (2, 7, 0.25)):
        knobs = sampling.Sampler(temperature, top_k, top_p).knobs
        draw(knobs, jax.random.key(0), jnp.zeros((2, 8)))
    assert traced == [1]


@pytest.mark.parametrize("odd", [{"temperature": -1}, {"temperature": np.nan}, {"top_p": np.nan}])
def test_numbers_that_sample_nothing(odd):
    with pytest.raises(ValueError, match=next(iter(odd))):
        sampling.Sampler(**odd)
