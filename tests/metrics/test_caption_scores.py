"""CIDEr-D, BLEU and ROUGE-L: an original's number, and by hand."""

import json
import math
import pathlib

import numpy as np
import pytest

from vlm_jax.metrics import captions

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "nextchat" / "text_io.json"


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())["metric_regcap"]


def test_words_of_the_reference(golden):
    for i, text in enumerate(golden["preds"]):
        assert " ".join(captions.words(text)) == golden["tokenized"]["preds"][str(i)][0]
    for i, text in enumerate(golden["targets"]):
        answer = text.rpartition("ASSISTANT: ")[2]
        assert " ".join(captions.words(answer)) == golden["tokenized"]["targets"][str(i)][0]


@pytest.mark.parametrize("text, words", [
    ("A man's dog, isn't it?", "a man 's dog is n't it"),
    ("t-shirt - \"red\" (left)", "t-shirt red left"),
    ("They\u2019re 2.5 m away...", "they 're 2.5 m away"),
    ("", ""),
])  # fmt: skip
def test_words(text, words):
    assert captions.words(text) == words.split()


def test_cider_of_the_reference(golden):
    said, true = (
        [captions.words(x.rpartition("ASSISTANT: ")[2]) for x in golden[key]]
        for key in ("preds", "targets")
    )
    found = captions.cider_d(said, [[x] for x in true])
    assert 100 * found.mean() == pytest.approx(golden["CIDEr"], rel=1e-9)


def test_cider_of_the_same_words():
    """Ten for each n that there is; nothing for words of every image."""
    true = [["a", "red", "dog", "runs"], ["the", "cat"]]
    found = captions.cider_d(true, [[x] for x in true])
    np.testing.assert_allclose(found, [10, 5])
    same = [["a", "dog"]] * 2
    np.testing.assert_allclose(captions.cider_d(same, [[x] for x in same]), [0, 0])


def test_cider_by_hand():
    """One shared word of two; the word of both images counts nothing. Lengths differ by a pair."""
    true = [["red", "dog"], ["blue", "dog"]]
    found = captions.cider_d([["red", "dog", "red"], []], [[x] for x in true])
    # n=1: min(2, 1) * 1 over the norms 2 and 1 (of log 2 squared, which goes out).
    # n=2: "red dog" and "dog red" against "red dog": 1 over sqrt 2, as "dog red" has log 2, too.
    parts = 1 * 1 / (2 * 1) + 1 / math.sqrt(2)
    penalty = math.exp(-1 / 72)
    np.testing.assert_allclose(found, [10 * penalty * parts / 4, 0])


def test_bleu_by_hand():
    said, true = "the the the cat".split(), ["the cat sat".split(), "a cat on the mat".split()]
    counts = captions.bleu_counts(said, true)
    # Nearest of 3 and 5 to 4 is the shorter. Words: the once, cat once; pairs: the cat.
    np.testing.assert_array_equal(counts, [4, 3, 2, 4, 1, 3, 0, 2, 0, 1])
    assert captions.bleu(counts, 1) == pytest.approx(0.5)
    assert captions.bleu(counts, 2) == pytest.approx(math.sqrt(0.5 / 3))
    assert captions.bleu(counts, 4) == 0
    short = captions.bleu_counts(["cat"], [["a", "cat"]])
    assert captions.bleu(short, 1) == pytest.approx(math.exp(1 - 2))
    both = captions.bleu_counts(said, true) + short
    assert captions.bleu(both, 1) == pytest.approx(3 / 5)  # lengths 5 and 5


def test_rouge_by_hand():
    # Of "a b c d" and "a c x d": a, c, d.
    found = captions.rouge_l("a b c d".split(), ["a c x d".split()])
    assert found == pytest.approx(0.75)
    more = captions.rouge_l(["a"], [["a", "b"], ["c"]])
    assert more == pytest.approx(2.44 * 1 * 0.5 / (0.5 + 1.44 * 1))
    assert captions.rouge_l([], [["a"]]) == captions.rouge_l(["b"], [["a"]]) == 0
