import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.decoding import generate, sampling
from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.weights import llama as weights
from vlm_jax.weights import readers

KEY = jax.random.key(0)


@pytest.fixture(scope="module", params=["scanned", "decode"])
def network(request, golden_lvm):
    fields = json.loads((golden_lvm / "config.json").read_text())["llama"]
    cfg = weights.config_from_hf(fields)
    params = weights.from_hf(readers.read(golden_lvm / "llama.safetensors"), cfg)
    if request.param == "decode":
        params, cfg = llama.decode_form(params, cfg)
    fn = functional.Functional(lambda rngs: llama.Llama(cfg, rngs))
    compiled = functools.cache(
        lambda num_new, **options: generate.compile(fn.bind, num_new, **options)
    )

    def run(prompt, num_new, rng=KEY, valid=None, lengths=None, **options):
        made = compiled(num_new, **options)
        found = made(params, jnp.asarray(prompt), rng, valid, lengths=lengths)
        return np.asarray(found.tokens_bst)

    return run


@pytest.fixture(scope="module")
def io(golden_lvm):
    return np.load(golden_lvm / "io.npz")


NO_SPECIALS = sampling.Sampler(temperature=0, suppress_from=64)


def test_greedy_equals_the_reference(network, io):
    np.testing.assert_array_equal(network(io["gen.prompt"], 40)[:, 0], io["gen.greedy_all_vocab"])
    got = network(io["gen.prompt"], 40, sampler=NO_SPECIALS)
    np.testing.assert_array_equal(got[:, 0], io["gen.greedy_suppressed"])


def test_left_padding_and_several_samples(network, io):
    valid = jnp.asarray(io["gen.leftpad_mask"], bool)
    got = network(io["gen.prompt"], 12, valid=valid, num_samples=2)
    assert got.shape == (3, 2, 12)
    for i in range(2):
        np.testing.assert_array_equal(got[:, i], io["gen.leftpad_greedy_all_vocab"])


def test_whole_images(network, io):
    for kind, count in (("", 64), ("grow_", 128)):
        got = network(io[f"e2e.{kind}prompt_ids"], count, sampler=NO_SPECIALS)
        np.testing.assert_array_equal(got.ravel(), io[f"e2e.{kind}new_ids"].ravel())


def test_sampling_is_a_function_of_the_key(network, io):
    sampler = sampling.Sampler(temperature=1.0, suppress_from=64)
    options = dict(sampler=sampler, num_samples=4)
    first = network(io["gen.prompt"], 6, **options)
    assert (first < 64).all()
    np.testing.assert_array_equal(first, network(io["gen.prompt"], 6, **options))
    other = network(io["gen.prompt"], 6, rng=jax.random.key(1), **options)
    assert (first != other).any()
    assert len({row.tobytes() for row in first[0]}) > 1  # samples of a prompt differ
    assert (first[:, :, 0] != other[:, :, 0]).any()  # the key decides from the first token on


def test_stop_ids(network, io):
    whole = io["gen.greedy_all_vocab"]
    stop = int(whole[0, 5])
    got = network(io["gen.prompt"], 40, stop_ids=(stop,), pad_id=99)[:, 0]
    for row, full in zip(got, whole):
        hits = np.flatnonzero(full == stop)
        end = hits[0] + 1 if len(hits) else len(full)
        np.testing.assert_array_equal(row[:end], full[:end])
        assert (row[end:] == 99).all()


@dataclasses.dataclass
class Counter:
    """A cache that needs no network; shows that no model name is in the loop."""

    total: jax.Array

    def rows(self, index_r):
        return Counter(self.total[index_r])


jax.tree_util.register_dataclass(Counter, ["total"], [])


def test_any_step_function_will_do():
    # The next token is the sum of all tokens so far, modulo 10.
    class Adder:
        def embed(self, tokens_bt):
            return tokens_bt[..., None]

        def make_cache(self, rows, slots):
            return Counter(jnp.zeros(rows, jnp.int32))

        def step(self, x_btd, cache):
            total = cache.total + x_btd.sum((1, 2))
            return jax.nn.one_hot(total % 10, 10), x_btd[:, -1], Counter(total)

    network = Adder()
    run = jax.jit(
        lambda prompt: generate.generate(network, network.embed(prompt), 5, KEY, num_samples=2)
    )
    got = run(jnp.array([[1, 2], [0, 1]])).tokens_bst
    np.testing.assert_array_equal(got, [[[3, 6, 2, 4, 8]] * 2, [[1, 2, 4, 8, 6]] * 2])
    with pytest.raises(ValueError, match="num_new 0"):
        generate.generate(network, jnp.zeros((1, 1, 1), int), 0, KEY)


@pytest.mark.parametrize("sampler", [NO_SPECIALS, sampling.Sampler(top_k=9, suppress_from=64)])
def test_shapes_that_are_filled_up_change_nothing(network, io, sampler):
    prompt = io["gen.prompt"]
    b, t = prompt.shape
    expected = network(prompt, 6, sampler=sampler, num_samples=2)
    filled = np.pad(prompt, [(0, 1), (0, 7)], constant_values=3)
    lengths = generate.Lengths(np.int32(t), np.int32(6))
    got = network(filled, 9, lengths=lengths, sampler=sampler, num_samples=2, pad_id=-1)
    np.testing.assert_array_equal(got[:b, :, :6], expected)
    assert (got[..., 6:] == -1).all()
