"""Ranking, merging and cutting of labels against the reference's lists."""

import functools
import json
import pathlib

import numpy as np
import pytest

from vlm_jax.decoding import one_shot
from vlm_jax.systems.nxtp import label_lists
from vlm_jax.weights import readers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "nxtp"
DELIMITER = 335
THEIR_NAMES = {
    "sim_mean": "sim_mean_euclid",
    "sim_max": "sim_max_cos",
    "sim_max_f": "sim_max_cos_f",
}


@functools.cache
def golden():
    """(arrays, meta)."""
    return dict(np.load(GOLDEN / "io.npz")), json.loads((GOLDEN / "meta.json").read_text())


@pytest.fixture(scope="module")
def decode():
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer.model"))
    size = model.get_piece_size()
    return lambda ids: model.decode([int(i) for i in ids if i < size])


def one_shot_result(tag):
    """The golden rows as a `OneShot`."""
    io, meta = golden()
    k, prompt = meta["oneshot"][tag]["k"], len(io["prompt_tokens"])
    probs = io[f"oneshot_{tag}_step_probs"].reshape(4, k, -1)
    ids = io[f"oneshot_{tag}_tokens_raw"].reshape(4, k, -1)[..., prompt:][..., : probs.shape[2]]
    end = ids == DELIMITER
    lengths = np.where(end.any(2), end.argmax(2) + 1, ids.shape[2])
    return one_shot.OneShot(ids, probs, lengths, end.any(2))


def assert_labels(labels, expected):
    assert [label.text for label in labels] == [text for text, _ in expected]
    np.testing.assert_allclose([x.score for x in labels], [s for _, s in expected], atol=2e-5)


@pytest.mark.parametrize("by", [by for by in label_lists.RANKINGS if by != "first"])
@pytest.mark.parametrize("tag", ["k1", "k3", "k5", "k10", "k6_forced"])
def test_reference_lists(decode, tag, by):
    io, meta = golden()
    table = readers.read(GOLDEN / "checkpoint.safetensors")[
        "language_decoder.tok_embeddings.weight"
    ]
    cosines = [label_lists.cosines_with(table, x) for x in io["image_tokens_with_cls"][:, 1:]]
    ranked = functools.partial(
        label_lists.rank_all,
        one_shot_result(tag),
        decode,
        delimiter_id=DELIMITER,
        by=by,
        cosines=cosines,
    )
    expected = meta["oneshot"][tag][THEIR_NAMES.get(by, by)]
    for labels, want in zip(ranked(reference=True), expected, strict=True):
        assert_labels(labels, want)
    if by != "ppl" and tag != "k6_forced":
        for labels, want in zip(ranked(), expected, strict=True):
            assert_labels(labels, want)
    if by == "ppl":  # the likeliest first
        for labels in ranked():
            scores = [label.score for label in labels]
            assert scores == sorted(scores) and all(score >= 1 for score in scores)


@pytest.mark.parametrize("penalty", ["penalty1.2", "penalty0"])
@pytest.mark.parametrize("by", ["prob", "ppl", "none"])
def test_reference_greedy_lists(decode, penalty, by):
    io, meta = golden()
    for i, want in enumerate(meta["greedy"][penalty][by]):
        ids, probs = (io[f"greedy_{penalty}_{part}"][i] for part in ("tokens", "probs"))
        groups = label_lists.sequence_groups(ids, probs, DELIMITER)
        labels = label_lists.rank(groups, decode, delimiter_id=DELIMITER, by=by, reference=True)
        assert_labels(labels, want)


@pytest.mark.parametrize("penalty", ["penalty1.2", "penalty0"])
def test_reference_beam_lists(decode, penalty):
    io, meta = golden()
    for i, want in enumerate(meta["beam3"][penalty]):
        ids = io[f"beam3_{penalty}_tokens_{i}"][0]
        groups = label_lists.sequence_groups(ids, np.zeros(len(ids)), DELIMITER)
        labels = label_lists.rank(groups, decode, delimiter_id=DELIMITER, by="none")
        assert [label.text for label in labels] == want


@pytest.mark.parametrize("by", ["prob", "ppl", "none"])
def test_duplicate_empty_and_unfinished(decode, by):
    io, meta = golden()
    groups = label_lists.sequence_groups(io["unit_post_tokens"], io["unit_post_probs"], DELIMITER)
    rank = functools.partial(label_lists.rank, groups, decode, delimiter_id=DELIMITER, by=by)
    assert_labels(rank(reference=True), meta["unit_post"][by])
    if by == "prob":
        assert_labels(rank(), [pair for pair in meta["unit_post"][by] if pair[0]])


WORDS = {1: " so", 2: "fa", 3: ",", 4: " cat", 5: " "}


def spell(ids):
    return "".join(WORDS[i] for i in ids)


def test_by_hand():
    found = one_shot.OneShot(
        np.array([[[1, 2, 3], [4, 3, -1], [1, 2, 3], [4, 4, 4], [3, -1, -1], [5, 3, -1]]]),
        np.array(
            [
                [
                    [0.5, 0.8, 0.5],
                    [0.3, 0.5, 1],
                    [0.1, 0.9, 1],
                    [0.5, 0.5, 0.5],
                    [0.4, 1, 1],
                    [0.3, 0.9, 1],
                ]
            ]
        ),
        np.array([[3, 2, 3, 3, 1, 2]]),
        np.array([[True, True, True, False, True, True]]),
    )

    def run(**kw):
        return label_lists.rank_all(found, spell, delimiter_id=3, **kw)[0]

    assert_labels(run(), [("sofa", 0.29), ("cat", 0.15)])
    assert_labels(run(by="first"), [("sofa", 0.6), ("cat", 0.3)])
    cut = run(unfinished=True)
    assert_labels(cut, [("sofa", 0.29), ("cat", 0.15), ("cat cat cat", 0.125)])
    assert [label.complete for label in cut] == [True, True, False]
    # The cut-off label's invented delimiter takes the next one's probability, .4, that one the
    # .3 of the blank, and of the blank nothing is left.
    assert_labels(
        run(reference=True),
        [("", 0.3), (" sofa", 0.29), (" cat", 0.15), (" cat cat cat", 0.05)],
    )


def test_errors():
    with pytest.raises(ValueError, match="'best' is none of prob, first"):
        label_lists.rank([], spell, delimiter_id=3, by="best")
    with pytest.raises(ValueError, match="give `cosines`"):
        label_lists.rank([], spell, delimiter_id=3, by="sim_max")
