"""What a network reads next, what a feed remembers, and networks that are no LLaMA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.decoding import beam, feeds, generate, processors, sampling
from vlm_jax.models import caches, llama

CFG = llama.LlamaConfig(40, 32, 2, 48, 4, num_kv_heads=2)
KEY = jax.random.key(0)
PROMPT = np.array([[3, 9, 27, 1], [5, 25, 2, 10]])
NEW = 6
STOPS = (2, 7, 11, 13, 20, 31)
SPECIAL = tuple(range(0, 40, 3))  # tokens that a vector of its own follows


@functools.cache
def parameters(layout):
    params = jax.jit(llama.make(CFG).init)(KEY)
    params = jax.tree.map(lambda x: x * 5, params)
    return (params, CFG) if layout == "scanned" else llama.decode_form(params, CFG)


def is_special(token):
    return (token[..., None] == jnp.array(SPECIAL)).any(-1)


def answering(network):
    """Behind a special token the network reads a function of the state that it was drawn from."""
    plain = feeds.tokens(network.embed)

    def feed(drawn, carry):
        x, _ = plain(drawn, None)
        x = jnp.where(is_special(drawn.token)[..., None], jnp.sin(3 * drawn.hidden), x)
        axis = drawn.token.ndim
        return x, {
            "x": jax.lax.dynamic_update_index_in_dim(carry["x"], x, drawn.index, axis),
            "hidden": jax.lax.dynamic_update_index_in_dim(
                carry["hidden"], drawn.hidden, drawn.index, axis
            ),
        }

    return feed


def empty(*rows):
    return {name: jnp.zeros((*rows, NEW, CFG.width)) for name in ("x", "hidden")}


def whole(network, prompt_btd, x_btd):
    """Logits and states behind the prompt, of everything at once, without a cache."""
    all_btd = jnp.concatenate([prompt_btd, x_btd], axis=1)
    hidden_btd, _ = network.transform(all_btd)
    hidden_btd = hidden_btd[:, prompt_btd.shape[1] - 1 :]
    return network.logits(hidden_btd), hidden_btd


@pytest.mark.parametrize("layout", ["scanned", "decode"])
@pytest.mark.parametrize("share", [False, True])
def test_a_feed_decides_what_is_read(layout, share):
    params, cfg = parameters(layout)

    @jax.jit
    def run(params):
        network = llama.make(cfg).bind(params)
        prompt_btd = network.embed(PROMPT)
        sampler = sampling.Sampler(temperature=2.0)
        made = generate.generate(
            network,
            prompt_btd,
            NEW,
            KEY,
            sampler=sampler,
            feed=answering(network),
            carry=empty(4),
            num_samples=2,
            share_prompt=share,
            logp=True,
        )
        repeated_rtd = jnp.repeat(prompt_btd, 2, axis=0)
        return made, whole(network, repeated_rtd, made.carry["x"]), network.embed(made.tokens_bst)

    made, (logits, hidden), embedded = jax.tree.map(np.asarray, run(params))
    np.testing.assert_allclose(made.carry["hidden"], hidden[:, :-1], atol=2e-4)
    tokens = made.tokens_bst.reshape(4, NEW)
    special = np.isin(tokens, SPECIAL)
    assert special.any() and not special.all()
    embedded = embedded.reshape(4, NEW, -1)
    np.testing.assert_array_equal(made.carry["x"][~special], embedded[~special])
    np.testing.assert_allclose(
        made.carry["x"][special], np.sin(3 * made.carry["hidden"][special]), atol=1e-5
    )
    logp = np.asarray(jax.nn.log_softmax(logits[:, :-1] / 2.0))
    want = np.take_along_axis(logp, tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(made.logp_bst.reshape(4, NEW), want, atol=2e-4)
    assert (made.lengths_bs == NEW).all()


def test_samples_that_share_a_prompt_draw_the_same():
    params, cfg = parameters("decode")
    options = dict(sampler=sampling.Sampler(top_k=9), num_samples=3, stop_ids=STOPS, pad_id=-1)
    valid = np.array([[True] * 4, [False] + [True] * 3])
    made = [
        generate.compile(llama.make(cfg).bind, 12, share_prompt=share, **options)(
            params, PROMPT, KEY, valid
        )
        for share in (False, True)
    ]
    np.testing.assert_array_equal(made[0].tokens_bst, made[1].tokens_bst)
    np.testing.assert_array_equal(made[0].lengths_bs, made[1].lengths_bs)
    tokens, lengths = np.asarray(made[0].tokens_bst), np.asarray(made[0].lengths_bs)
    assert lengths.min() < 12  # one has ended
    for row, length in zip(tokens.reshape(6, 12), lengths.ravel()):
        assert (row[length:] == -1).all() and (row[:length] >= 0).all()
        assert not np.isin(row[: length - 1], STOPS).any()
        assert length == 12 or row[length - 1] in STOPS


def test_what_a_beam_remembers_follows_it():
    params, cfg = parameters("decode")

    @jax.jit
    def run(params):
        network = llama.make(cfg).bind(params)
        prompt_btd = network.embed(PROMPT)
        found = beam.decode(
            network,
            prompt_btd,
            num_new=NEW,
            beam_size=3,
            end_id=4,
            feed=answering(network),
            carry=empty(2, 3),
        )
        repeated_rtd = jnp.repeat(prompt_btd, 3, axis=0)
        x_rtd = found.carry["x"].reshape(6, NEW, -1)
        return found, whole(network, repeated_rtd, x_rtd)

    found, (logits, hidden) = jax.tree.map(np.asarray, run(params))
    ids, states = found.ids_bwt.reshape(6, NEW), found.carry["hidden"].reshape(6, NEW, -1)
    assert len({row.tobytes() for row in ids}) == 6
    logp = np.asarray(jax.nn.log_softmax(logits))
    for row, state, want, p, score in zip(ids, states, hidden, logp, found.scores_bw.ravel()):
        length = (row != beam.PAD_ID).sum()
        before_end = length - (row[length - 1] == 4)
        np.testing.assert_allclose(state[:before_end], want[:before_end], atol=2e-4)
        total = p[np.arange(length), row[:length]].sum()
        np.testing.assert_allclose(score, total / length, atol=1e-4)


# ---- an encoder and a decoder -----------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossCache:
    """Keys of an encoder, once per image, and those of the decoder."""

    memory_bsd: jax.Array
    own: caches.Cache | caches.Branches

    def fork(self, num_branches, num_slots):
        return CrossCache(self.memory_bsd, self.own.fork(num_branches, num_slots))

    def select(self, index_bw):
        return CrossCache(self.memory_bsd, self.own.select(index_bw))

    def rows(self, index_r):
        return CrossCache(self.memory_bsd[index_r], self.own.rows(index_r))


class EncoderDecoder:
    """A toy: a LLaMA whose logits also depend on what its states find in the encoder's vectors."""

    def __init__(self, network):
        self.network, self.embed = network, network.embed

    def make_cache(self, memory_bsd, slots):
        return CrossCache(memory_bsd, self.network.make_cache(len(memory_bsd), slots))

    def step(self, x_btd, cache, **context):
        _, hidden, own = self.network.step(x_btd, cache.own, **context)
        rows = hidden if hidden.ndim == 3 else hidden[:, None]
        logits_brv = self.logits(rows, cache.memory_bsd)
        logits = logits_brv if hidden.ndim == 3 else logits_brv[:, 0]
        return logits, hidden, CrossCache(cache.memory_bsd, own)

    def logits(self, hidden_btd, memory_bsd):
        weights_bts = jax.nn.softmax(jnp.einsum("btd,bsd->bts", hidden_btd, memory_bsd))
        return self.network.logits(hidden_btd + weights_bts @ memory_bsd)


def recomputed(model, memory_1sd, ids):
    """log probabilities of every next token of one sequence."""
    hidden, _ = model.network.transform(model.embed(ids[None]))
    return jax.nn.log_softmax(model.logits(hidden, memory_1sd))[0]


@functools.cache
def encoder_decoder():
    params, cfg = parameters("decode")
    memory = np.asarray(jax.random.normal(jax.random.key(3), (2, 5, CFG.width))) * 3
    bind = llama.make(cfg).bind
    logp = jax.jit(lambda memory, ids: recomputed(EncoderDecoder(bind(params)), memory, ids))
    return params, bind, memory, logp


def test_encoder_decoder_greedy():
    params, bind, memory, logp = encoder_decoder()

    @jax.jit
    def run(params, memory):
        model = EncoderDecoder(bind(params))
        start_btd = model.embed(jnp.zeros((2, 1), jnp.int32))
        cache = model.make_cache(memory, NEW)
        return generate.generate(model, start_btd, NEW, KEY, cache=cache).tokens_bst[:, 0]

    tokens = np.asarray(run(params, memory))
    assert (tokens[0] != tokens[1]).any()  # the encoder is heard
    for image in range(2):
        ids = np.concatenate([[0], tokens[image]])
        best = np.asarray(logp(memory[image : image + 1], ids)).argmax(1)
        np.testing.assert_array_equal(best[:-1], tokens[image])


def test_encoder_decoder_beams():
    params, bind, memory, logp = encoder_decoder()
    size, end = 3, 11
    seen = {}

    @jax.jit
    def run(params, memory):
        model = EncoderDecoder(bind(params))
        step = model.step

        def watched(x, cache, **context):
            seen[x.shape] = jax.tree.map(jnp.shape, cache)
            return step(x, cache, **context)

        model.step = watched
        start_btd = model.embed(jnp.zeros((2, 1), jnp.int32))
        cache = model.make_cache(memory, 1)
        return beam.decode(model, start_btd, num_new=NEW, beam_size=size, end_id=end, cache=cache)

    found = jax.tree.map(np.asarray, run(params, memory))
    assert seen[2, size, CFG.width].memory_bsd == (2, 5, CFG.width)  # not once per beam
    for image in range(2):
        beams, finished = [(0.0, [0])], []
        for _ in range(NEW):
            more = []
            for total, ids in beams:
                filled = np.array(ids + [0] * (NEW + 1 - len(ids)))
                row = np.asarray(logp(memory[image : image + 1], filled))[len(ids) - 1]
                more += [(total + row[t], [*ids, int(t)]) for t in range(len(row))]
            more.sort(key=lambda x: -x[0])
            beams = []
            for candidate in more:
                if len(beams) == size:
                    break
                (finished if candidate[1][-1] == end else beams).append(candidate)
            finished = finished[:size]
            if len(finished) == size:
                break
        pool = finished + beams[: size - len(finished)]
        pool = sorted(((t / (len(ids) - 1), ids[1:]) for t, ids in pool), key=lambda x: -x[0])
        for ids, score, (want, want_ids) in zip(
            found.ids_bwt[image], found.scores_bw[image], pool, strict=True
        ):
            assert [t for t in ids.tolist() if t != beam.PAD_ID] == want_ids
            np.testing.assert_allclose(score, want, atol=1e-4)


# ---- processors, looking inside ---------------------------------------------------------------


def test_penalty_follows_beams_and_rows():
    penalty = processors.Penalty(2.0)
    state = penalty.update(penalty.init((1, 2), 4), jnp.array([[1, 3]]), None)
    state = penalty.update(state, jnp.array([[0, 2]]), jnp.array([[1, 1]]))  # both continue beam 1
    got = penalty(jnp.array([[[4.0, 4.0, -4.0, 4.0]] * 2]), state)
    np.testing.assert_array_equal(got, [[[2, 4, -4, 2], [4, 4, -2, 2]]])
    np.testing.assert_array_equal(processors.Penalty(0)(got, state), got)


@pytest.mark.parametrize("layout", ["scanned", "decode"])
def test_attention_maps_of_every_layer(layout):
    params, cfg = parameters(layout)
    valid = np.array([[True] * 4, [False, False, True, True]])

    @jax.jit
    def run(params):
        network = llama.make(cfg).bind(params)
        return network.attention_maps(PROMPT, valid_bt=valid, prefix_block=2)

    maps = np.asarray(run(params))
    assert maps.shape == (CFG.depth, 2, CFG.num_heads, 4, 4)
    np.testing.assert_allclose(maps[:, 0].sum(-1), 1, atol=1e-5)
    open_ts = np.tril(np.ones((4, 4), bool))
    open_ts[:2, :2] = True
    assert (maps[:, 0][..., ~open_ts] == 0).all() and (maps[:, 0][..., open_ts] > 0).mean() > 0.99
    assert (maps[:, 1, :, 2:, :2] == 0).all()
    # The first layer by hand: softmax of rotated queries and keys, made in the training layout.
    plain, trained = parameters("scanned")
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), plain["layers"])
    x = np.asarray(plain["embed"]["table"], np.float64)[PROMPT[0]]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + trained.rms_eps)
    x = x * layer["attn_norm"]["scale"]
    q = np.einsum("td,dnh->tnh", x, layer["attn"]["q"]["kernel"])
    k = np.einsum("td,dkh->tkh", x, layer["attn"]["k"]["kernel"]).repeat(2, axis=1)
    half = trained.head_size // 2
    angle = np.arange(4)[:, None] * 1e4 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    q, k = (
        np.concatenate(
            [z[..., :half] * cos - z[..., half:] * sin, z[..., half:] * cos + z[..., :half] * sin],
            axis=-1,
        )
        for z in (q, k)
    )
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(trained.head_size)
    weights = np.exp(np.where(open_ts, scores, -np.inf))
    np.testing.assert_allclose(maps[0, 0], weights / weights.sum(-1, keepdims=True), atol=1e-5)


def test_branches_take_no_context():
    params, cfg = parameters("decode")

    def run(params):
        network = llama.make(cfg).bind(params)
        step = network.step(network.embed(PROMPT), network.make_cache(2, 4))
        return network.step(network.embed(PROMPT[:, :3]), step.cache.fork(3, 2), prefix_block=1)

    with pytest.raises(ValueError, match="a token of each branch follows its own past"):
        jax.eval_shape(run, params)
