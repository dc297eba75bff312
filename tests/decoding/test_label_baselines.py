"""Greedy, sampled and beam search against the reference's sequences, and cached against plain."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.decoding import beam, sampling
from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.ops import masks
from vlm_jax.systems.nxtp import label_sequence, reference_beam
from vlm_jax.weights import llama as weights
from vlm_jax.weights import readers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "nxtp"
IMAGE = 9
DELIMITER = 335
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def io():
    return dict(np.load(GOLDEN / "io.npz"))


@pytest.fixture(scope="module")
def meta():
    return json.loads((GOLDEN / "meta.json").read_text())


@functools.cache
def decoder():
    prefix = "language_decoder."
    tensors = readers.read(GOLDEN / "checkpoint.safetensors")
    arrays = {n.removeprefix(prefix): tensors[n] for n in tensors if n.startswith(prefix)}
    cfg = llama.LlamaConfig(354, 64, 2, 176, 4, rms_eps=1e-5)
    params, cfg = llama.decode_form(weights.from_meta(arrays, cfg), cfg)
    return params, functional.Functional(lambda rngs: llama.Llama(cfg, rngs))


@functools.cache
def compiled(module, **options):
    return module.compile(decoder()[1].bind, prefix_block=IMAGE, **options)


def sequence(prefix, rng=KEY, **options):
    ids, probs = compiled(label_sequence, **options)(decoder()[0], prefix, rng)
    return np.asarray(ids), np.asarray(probs)


def search(prefix, **options):
    return jax.tree.map(np.asarray, compiled(beam, **options)(decoder()[0], prefix))


@pytest.mark.parametrize("penalty", [1.2, 0])
def test_reference_greedy(io, penalty):
    tag = f"greedy_penalty{penalty}"
    ids, probs = sequence(
        io["prefill_input_embeds"], num_new=24, delimiter_id=DELIMITER, penalty=penalty
    )
    np.testing.assert_array_equal(ids[:, 0], io[f"{tag}_tokens"])
    np.testing.assert_allclose(probs[:, 0], io[f"{tag}_probs"], atol=1e-5)
    # The mask of the last step, from the ids.
    end = io[f"{tag}_tokens"][:, :23] == DELIMITER
    segments = np.pad(np.cumsum(end, 1) - end + 2, ((0, 0), (17, 0)), constant_values=1)
    mask = masks.sequential_labels(jnp.asarray(segments), jnp.asarray(end.sum(1)), IMAGE)
    np.testing.assert_array_equal(mask, io[f"{tag}_last_step_mask"][:, 0])


@jax.jit
def logits_after(params, prefix, ids, row):
    """Logits at one row, over the causal mask and without a cache."""
    module = decoder()[1].bind(params)
    x = jnp.concatenate([prefix, module.embed(ids)], axis=1)
    hidden, _ = module.transform(x, prefix_block=IMAGE)
    return module.logits(hidden[:, row][:, None])[:, 0]


def by_steps(prefix, num_new, penalty):
    """Greedy, every sequence from its start for every token."""
    ids, probs = np.zeros((len(prefix), num_new), int), []
    for i in range(num_new):
        logits = np.array(logits_after(decoder()[0], prefix, ids, prefix.shape[1] - 1 + i))
        for b, row in enumerate(logits):
            row[np.unique(ids[b, :i])] /= penalty
        ids[:, i] = logits.argmax(1)
        probs.append(np.asarray(jax.nn.softmax(logits)).max(1))
    return ids, np.stack(probs, 1)


def test_cached_greedy_equals_recomputing(io):
    prefix = io["prefill_input_embeds"]
    want_ids, want_probs = by_steps(prefix, 12, 1.2)
    ids, probs = sequence(prefix, num_new=12, num_samples=2)
    for i in range(2):
        np.testing.assert_array_equal(ids[:, i], want_ids)
        np.testing.assert_allclose(probs[:, i], want_probs, atol=1e-5)
    # Until a second label is complete, both masks show the same.
    isolating, _ = sequence(prefix, num_new=24, delimiter_id=DELIMITER)
    np.testing.assert_array_equal(isolating[:, 0, :9], ids[:, 0, :9])


@pytest.mark.parametrize("form", [{}, {"delimiter_id": DELIMITER}])
def test_sampling(io, form):
    prefix = io["prefill_input_embeds"]
    options = dict(num_new=3, sampler=sampling.Sampler(top_k=5), penalty=0, num_samples=8, **form)
    ids, probs = sequence(prefix, **options)
    assert ids.shape == probs.shape == (4, 8, 3)
    logits = io["prefill_logits_last"]
    best = np.argsort(-logits)[:, :5]
    for row, top, first, p in zip(logits, best, ids[..., 0], probs[..., 0]):
        assert set(first) <= set(top) and len(set(first)) > 1
        np.testing.assert_allclose(p, np.exp(row[first]) / np.exp(row[top]).sum(), rtol=1e-4)
    again, _ = sequence(prefix, **options)
    np.testing.assert_array_equal(again, ids)
    other, _ = sequence(prefix, jax.random.key(1), **options)
    assert (other != ids).any()


@pytest.mark.parametrize("p", ["0.5", "0.9"])
def test_nucleus_keeps_what_the_reference_keeps(io, p):
    logits = sampling.Sampler(top_p=float(p)).warp(jnp.asarray(io["prefill_logits_last"]))
    np.testing.assert_array_equal(np.isfinite(logits).sum(1), io[f"top_p_{p}_kept"])


@pytest.mark.parametrize("penalty", [1.2, 0])
def test_reference_beams(io, penalty):
    prompt = jnp.tile(io["prompt_tokens"], (4, 1))
    run = compiled(reference_beam, num_new=24, end_id=2, penalty=penalty)
    found = jax.tree.map(np.asarray, run(decoder()[0], io["prefill_input_embeds"], prompt))
    for i in range(4):
        want = io[f"beam3_penalty{penalty}_tokens_{i}"][0]
        assert want[-1] == 2  # appended to what did not end
        np.testing.assert_array_equal(found.ids_bwt[i, 0], want[:-1])


def exhaustive(prefix, num_new, width, end_id):
    """The same search in plain Python on whole sequences."""
    beams, finished = [(0.0, [])], []
    for i in range(num_new):
        ids = np.zeros((width, num_new), int)
        for row, (_, tokens) in zip(ids, beams):
            row[: len(tokens)] = tokens
        rows = np.repeat(prefix, width, axis=0)
        logits = logits_after(decoder()[0], rows, ids, prefix.shape[1] - 1 + i)
        logp = np.asarray(jax.nn.log_softmax(logits))
        more = [
            (total + logp[w, t], [*tokens, int(t)])
            for w, (total, tokens) in enumerate(beams)
            for t in np.argsort(-logp[w], kind="stable")[: width + 1]
        ]
        beams = []
        for candidate in sorted(more, key=lambda x: -x[0]):
            if len(beams) == width:
                break
            ended = candidate[1][-1] == end_id
            (finished if ended else beams).append(candidate)
        finished = finished[:width]
        if len(finished) == width:
            break
    pool = finished + beams[: width - len(finished)]
    return sorted(((total / len(ids), ids) for total, ids in pool), key=lambda x: -x[0])


@pytest.mark.parametrize("end_id", [DELIMITER, None])
def test_beams_follow_their_past(io, end_id):
    prefix = io["prefill_input_embeds"][:2]
    found = search(prefix, num_new=6, end_id=end_id)
    assert found.ids_bwt.shape == (2, 3, 6)
    ends = set()
    for i in range(2):
        want = exhaustive(prefix[i : i + 1], 6, 3, end_id)
        for ids, score, (want_score, want_ids) in zip(
            found.ids_bwt[i], found.scores_bw[i], want, strict=True
        ):
            assert [t for t in ids.tolist() if t != beam.PAD_ID] == want_ids
            np.testing.assert_allclose(score, want_score, atol=1e-5)
            ends.add(want_ids[-1] == end_id)
    assert True in ends or end_id is None


def test_errors(io):
    prefix = io["prefill_input_embeds"]
    with pytest.raises(ValueError, match="beam_size 354 must be below the vocabulary of 354"):
        search(prefix, num_new=2, beam_size=354)
    with pytest.raises(ValueError, match="num_new 0"):
        sequence(prefix, num_new=0)
