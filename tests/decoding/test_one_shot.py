"""One-shot sampling against the reference's tokens and probabilities, and against itself."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.decoding import one_shot
from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.weights import llama as weights
from vlm_jax.weights import readers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "nxtp"
IMAGE = 9  # tokens
DELIMITER = 335
LIMIT = 19  # sampled tokens: one less than the reference's update limit of 20


@functools.cache
def golden():
    """(arrays, meta)."""
    return dict(np.load(GOLDEN / "io.npz")), json.loads((GOLDEN / "meta.json").read_text())


@functools.cache
def released():
    prefix = "language_decoder."
    tensors = readers.read(GOLDEN / "checkpoint.safetensors")
    arrays = {n.removeprefix(prefix): tensors[n] for n in tensors if n.startswith(prefix)}
    cfg = llama.LlamaConfig(354, 64, 2, 176, 4, rms_eps=1e-5)
    return weights.from_meta(arrays, cfg), cfg


@functools.cache
def decoder(kind="decode"):
    """(params, cfg) of the tiny reference decoder, or of a random one with SmolLM2's structure."""
    params, cfg = released()
    if kind == "grouped":
        cfg = llama.LlamaConfig(120, 48, 2, 64, 6, num_kv_heads=2, tie_embeddings=True)
        params = jax.jit(network(cfg).init)(jax.random.key(0))
        params = jax.tree.map(lambda x: x * 8, params)
    return (params, cfg) if kind == "scanned" else llama.decode_form(params, cfg)


@functools.cache
def network(cfg):
    return functional.Functional(lambda rngs: llama.Llama(cfg, rngs))


@functools.cache
def compiled(cfg, **options):
    options = dict(max_tokens=LIMIT, delimiter_id=DELIMITER, prefix_block=IMAGE) | options
    return one_shot.compile(network(cfg).bind, **options)


def decode(prefix, kind="decode", valid=None, **options):
    params, cfg = decoder(kind)
    return jax.tree.map(np.asarray, compiled(cfg, **options)(params, prefix, valid))


def assert_equal(found, expected, probs=1e-6):
    np.testing.assert_array_equal(found.ids_bkt, expected.ids_bkt)
    np.testing.assert_allclose(found.probs_bkt, expected.probs_bkt, rtol=10 * probs, atol=probs)
    np.testing.assert_array_equal(found.lengths_bk, expected.lengths_bk)
    np.testing.assert_array_equal(found.ended_bk, expected.ended_bk)


@pytest.mark.parametrize("kind", ["decode", "scanned"])
def test_prefill_logits(kind):
    io, _ = golden()
    params, cfg = decoder(kind)

    @jax.jit
    def run(params, x_btd):
        module = network(cfg).bind(params)
        return module.step(x_btd, module.make_cache(*x_btd.shape[:2]), prefix_block=IMAGE).logits

    logits = run(params, io["prefill_input_embeds"])
    np.testing.assert_allclose(logits, io["prefill_logits_last"], atol=1e-4)


def cut_to(k, steps, found):
    """What a run with a smaller k and limit gives: a label depends on its first token alone."""
    return one_shot.OneShot(
        *(
            x[:, :k, :steps] if x.ndim == 3 else x[:, :k]
            for x in (found.ids_bkt, found.probs_bkt, found.lengths_bk, found.ended_bk)
        )
    )


@pytest.mark.parametrize("tag", ["k1", "k3", "k5", "k10", "k6_forced"])
def test_reference_tokens_and_probabilities(tag):
    io, meta = golden()
    case = meta["oneshot"][tag]
    k, prompt, limit = case["k"], len(io["prompt_tokens"]), case["max_update_iter"] - 1
    probs = io[f"oneshot_{tag}_step_probs"].reshape(4, k, -1)
    steps = probs.shape[2]
    tokens = io[f"oneshot_{tag}_tokens_raw"].reshape(4, k, -1)[..., prompt : prompt + steps]
    # The reference goes on behind a label's end while another is unfinished.
    raw = decode(io["prefill_input_embeds"], k=10, max_tokens=12, stop=False)
    raw = cut_to(k, steps, raw)
    np.testing.assert_array_equal(raw.ids_bkt, tokens)
    np.testing.assert_allclose(raw.probs_bkt, probs, atol=1e-5)

    if tag in ("k3", "k6_forced"):  # runs of their own
        kind = "scanned" if tag == "k3" else "decode"
        found = decode(io["prefill_input_embeds"], kind, k=k, max_tokens=limit)
    else:
        found = cut_to(k, limit, decode(io["prefill_input_embeds"], k=10))
    assert found.ended_bk.all() == (not case["hit_limit"])
    assert found.lengths_bk.max() == steps
    inside = np.arange(limit) < found.lengths_bk[..., None]
    cut = np.where(inside[..., :steps], tokens, one_shot.PAD_ID)
    np.testing.assert_array_equal(found.ids_bkt[..., :steps], cut)
    assert (found.ids_bkt[~inside] == one_shot.PAD_ID).all()
    assert (found.probs_bkt[~inside] == 1).all()
    np.testing.assert_array_equal(found.ended_bk, (cut == DELIMITER).any(2))
    for i in range(4):
        flat = found.ids_bkt[i][inside[i]]
        want = io[f"oneshot_{tag}_flat_tokens_{i}"]
        if case["hit_limit"]:  # there a delimiter is put behind unfinished labels
            assert len(want) == len(flat) + (~found.ended_bk[i]).sum()
        else:
            np.testing.assert_array_equal(flat, want)
        flat_probs = found.probs_bkt[i][inside[i]]
        np.testing.assert_allclose(flat_probs, io[f"oneshot_{tag}_flat_probs_{i}"], atol=1e-5)


@pytest.mark.parametrize("kind", ["decode", "grouped"])
def test_equals_a_loop_over_labels_without_a_cache(kind):
    io, _ = golden()
    params, cfg = decoder(kind)
    prefix = jnp.asarray(io["prefill_input_embeds"][:2, :, : cfg.width])
    delimiter = DELIMITER % cfg.vocab_size
    k, steps = (100 if kind == "decode" else 20), 4
    found = decode(prefix, kind, k=k, max_tokens=steps, delimiter_id=delimiter)
    bound = network(cfg).bind

    @jax.jit
    def forward(params, x, tokens, row):
        module = bound(params)
        x = jnp.concatenate([x, module.embed(tokens)], axis=1)
        hidden, _ = module.transform(x, prefix_block=IMAGE)
        return jax.nn.softmax(module.logits(hidden[:, row][:, None])[0, 0])

    p = prefix.shape[1]
    for image in range(2):
        x = prefix[image : image + 1]
        first = np.asarray(forward(params, x, np.zeros((1, steps), int), p - 1))
        order = np.argsort(-first, kind="stable")[:k]
        np.testing.assert_array_equal(found.ids_bkt[image, :, 0], order)
        np.testing.assert_allclose(found.probs_bkt[image, :, 0], first[order], rtol=2e-5)
        for label in range(0, k, 7):
            ids, probs = [int(order[label])], [float(first[order[label]])]
            while len(ids) < steps and ids[-1] != delimiter:
                tokens = np.array([ids + [0] * (steps - len(ids))])
                after = np.asarray(forward(params, x, tokens, p - 1 + len(ids)))
                ids.append(int(after.argmax()))
                probs.append(float(after.max()))
            assert found.lengths_bk[image, label] == len(ids)
            assert found.ids_bkt[image, label, : len(ids)].tolist() == ids
            np.testing.assert_allclose(
                found.probs_bkt[image, label, : len(ids)], probs, rtol=1e-4, atol=1e-6
            )


def test_a_batch_is_its_images():
    prefix = golden()[0]["prefill_input_embeds"]
    batch = decode(prefix, k=10)
    for i in range(4):
        alone = decode(prefix[i : i + 1], k=10)  # one program
        assert_equal(jax.tree.map(lambda x, i=i: x[i : i + 1], batch), alone)


def test_shorter_prefixes_in_a_batch():
    prefix = golden()[0]["prefill_input_embeds"]
    cut = np.arange(prefix.shape[1])[None] < np.array([17, 13, 17, 13])[:, None]
    batch = decode(np.where(cut[..., None], prefix, 7.0), k=10, valid=jnp.asarray(cut))
    for i, length in enumerate(cut.sum(1)):
        alone = decode(prefix[i : i + 1, :length], k=10)
        assert_equal(jax.tree.map(lambda x, i=i: x[i : i + 1], batch), alone)


def test_groups_and_narrowing_change_nothing():
    prefix = golden()[0]["prefill_input_embeds"]
    params, cfg = decoder()
    run = functools.partial(one_shot.compile, network(cfg).bind)
    fixed = dict(k=37, max_tokens=LIMIT, delimiter_id=DELIMITER, prefix_block=IMAGE)
    assert one_shot._widths(37, True) == [(37, 9), (9, 0)]
    assert one_shot._widths(37, False) == [(37, 0)]
    assert one_shot._widths(400, True) == [(400, 100), (100, 25), (25, 0)]
    narrowing = jax.tree.map(np.asarray, run(**fixed)(params, prefix))
    assert 5 < narrowing.lengths_bk.max() and (narrowing.lengths_bk < 5).any()
    # Ten at a time, three spare; so few are not narrowed.
    assert_equal(run(**fixed, max_rows=40)(params, prefix), narrowing)


def test_whole_vocabulary(monkeypatch):
    monkeypatch.setattr(one_shot, "_NARROWEST", 1000)
    prefix = golden()[0]["prefill_input_embeds"][:1]
    found = decode(prefix, k=354, max_tokens=3)
    assert sorted(found.ids_bkt[0, :, 0]) == list(range(354))
    assert abs(found.probs_bkt[0, :, 0].sum() - 1) < 1e-5
    first = found.ids_bkt[0, :, 0] == DELIMITER  # the empty label is over at once
    assert found.lengths_bk[0][first] == [1]
    assert found.ids_bkt[0][first].tolist() == [[DELIMITER, one_shot.PAD_ID, one_shot.PAD_ID]]
    one = decode(prefix, k=2, max_tokens=1)
    assert one.ids_bkt.shape == (1, 2, 1) and not one.ended_bk.any()


def test_errors():
    prefix = golden()[0]["prefill_input_embeds"]
    with pytest.raises(ValueError, match="k 355 is larger than the vocabulary of 354"):
        decode(prefix, k=355)
    with pytest.raises(ValueError, match="k 0 and max_tokens 19 must be at least 1"):
        decode(prefix, k=0)


def test_bfloat16():
    params, cfg = released()
    cfg = dataclasses.replace(cfg, dtype="bfloat16", scan_layers=True)
    prefix = golden()[0]["prefill_input_embeds"]
    found = one_shot.compile(
        network(cfg).bind, k=5, max_tokens=LIMIT, delimiter_id=DELIMITER, prefix_block=IMAGE
    )(params, prefix.astype(jnp.bfloat16))
    assert found.probs_bkt.dtype == jnp.float32
    exact = decode(prefix, k=5)
    np.testing.assert_array_equal(found.ids_bkt[:, 0, 0], exact.ids_bkt[:, 0, 0])
    np.testing.assert_allclose(found.probs_bkt[:, 0, 0], exact.probs_bkt[:, 0, 0], rtol=0.1)


class Scripted:
    """A network that says what it is told: step i of `rest`, whatever it is asked."""

    def __init__(self, first, rest, k):
        self.first, self.rest, self.k = first, rest, k

    def make_cache(self, rows, slots):
        return Script(None)

    def embed(self, tokens_br):
        return tokens_br[..., None]

    def step(self, x_btd, cache, **_):
        if cache.index is None:
            return self.first, None, cache
        logits_brv = self.rest[cache.index].reshape(len(self.first), self.k, -1)
        return logits_brv, None, Script(cache.index + 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Script:
    """The place in a script."""

    index: jax.Array | None

    def fork(self, num_branches, num_slots):
        return Script(jnp.int32(0))


def test_scripted_logits():
    # Initial tokens that are the delimiter, others that are EOS and unknown; ends at many steps.
    io, _ = golden()
    first, rest = io["unit_oneshot_logits_step0"], io["unit_oneshot_logits_rest"]
    k = rest.shape[1] // len(first)
    limit = dict(k=k, max_tokens=len(rest) + 1, delimiter_id=DELIMITER)
    network = Scripted(jnp.asarray(first), jnp.asarray(rest), k)

    def run(**stop):
        return one_shot.compile(lambda _: network, **limit, **stop)(
            None, jnp.zeros((len(first), 1, 1))
        )

    raw = run(stop=False)
    prompt = io["unit_oneshot_prompt"].shape[1]
    tokens = io["unit_oneshot_tokens_raw"].reshape(len(first), k, -1)[..., prompt:]
    np.testing.assert_array_equal(raw.ids_bkt[..., : tokens.shape[2]], tokens)
    found = run()
    for i in range(len(first)):
        inside = np.arange(found.ids_bkt.shape[2]) < found.lengths_bk[i][:, None]
        np.testing.assert_array_equal(found.ids_bkt[i][inside], io[f"unit_oneshot_flat_tokens_{i}"])
        np.testing.assert_allclose(
            found.probs_bkt[i][inside], io[f"unit_oneshot_flat_probs_{i}"], atol=1e-6
        )
