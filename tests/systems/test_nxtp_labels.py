"""Captions to nouns: every rule on literals, the golden captions, the taggers."""

import concurrent.futures
import json
import pathlib

import pytest

from vlm_jax.data import records
from vlm_jax.systems.nxtp import labels

CASES = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "nxtp" / "labels.json").read_text()
)["cases"]
CAPTIONS = [case["caption"][:40] for case in CASES]


class Dictionary:
    """Tags from a table; singular by cutting an s."""

    def __init__(self, **tags):
        self._tags = tags

    def tag(self, text):
        return [(word, self._tags.get(word, "XX")) for word in text.split()]

    def lemma(self, noun):
        return noun.removesuffix("s")


def wanted(case):
    return [label for label in case["labels_sorted"] if label]  # the reference has [""] for none


@pytest.mark.parametrize("case", CASES, ids=CAPTIONS)
def test_cleaning_agrees_with_the_reference(case):
    assert labels.clean(case["caption"]) == case["filtered"]


@pytest.mark.parametrize("case", CASES, ids=CAPTIONS)
def test_rules_on_the_reference_tags(case):
    lemma = labels.make_tagger("textblob").lemma  # agrees with WordNet's on these words
    tagged = zip(case["tokens"], case["tags"], strict=True)
    assert sorted(labels.from_tagged(tagged, lemma)) == wanted(case)


def test_textblob_agrees_as_documented():
    same = sum(sorted(labels.extract(c["caption"], "textblob")) == wanted(c) for c in CASES)
    assert same == 11 and "\n              11 give" in labels.__doc__


def test_nltk_agrees_on_all_captions():
    try:
        tagger = labels.make_tagger("nltk")
    except records.DataError as error:
        pytest.skip(f"NLTK's data are not on PyPI: {error}")
    for case in CASES:
        assert sorted(labels.extract(case["caption"], tagger)) == wanted(case)


def test_threads_agree_from_the_first_caption_on():
    labels._make_tagger.cache_clear()
    captions = [case["caption"] for case in CASES] * 10 + ["blorptions of zworks"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda caption: labels.extract(caption, "textblob"), captions))
    assert found == [labels.extract(caption, "textblob") for caption in captions]


def test_nltk_without_its_data_names_the_command(monkeypatch):
    import nltk

    def missing(*args, **kwargs):
        raise LookupError("Resource not found")

    monkeypatch.setattr(nltk.tag.perceptron, "PerceptronTagger", missing)
    labels._make_tagger.cache_clear()
    with pytest.raises(
        records.DataError,
        match="python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet",
    ):
        labels.extract("a dog", "nltk")
    monkeypatch.setattr(nltk, "__version__", "3.8.1")
    with pytest.raises(records.DataError, match="downloader punkt averaged_perceptron_tagger word"):
        labels.extract("a dog", "nltk")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nltk", None)
    labels._make_tagger.cache_clear()
    with pytest.raises(records.MissingExtraError, match=r"vlm_jax\[labels\]"):
        labels.make_tagger("nltk")


def test_unknown_tagger():
    with pytest.raises(records.DataError, match="no tagger 'stanza'; known: nltk, textblob"):
        labels.extract("a dog", "stanza")


def test_words_are_removed_inside_other_words():
    assert labels.clean("A laptop, today") == "a lap to"
    assert labels.clean("Sunday birthday countertop") == "sun birth counter"
    assert labels.clean("persons images") == "s s"  # "person" went first
    assert labels.clean("a top hat", labels.REMOVED_IN_PAPER) == "a top hat"


def test_characters_that_stay():
    assert labels.clean("Dog's\ncafé #1: tea&cake - 3.5,") == "dog's caf 1 tea cake - 3.5"


def test_only_common_nouns_without_digits():
    tagged = [("dog", "NN"), ("cats", "NNS"), ("paris", "NNP"), ("b2b", "NN"), ("red", "JJ")]
    assert labels.from_tagged(tagged, lambda w: w.removesuffix("s")) == ["dog", "cat"]


def test_words_are_unique_before_they_are_singular():
    tagger = Dictionary(dog="NN", dogs="NNS", tvs="NNS", ox="NN")
    assert labels.extract("dog dogs dog tvs ox", tagger) == ["dog", "dog"]


def test_several_captions_keep_common_labels():
    tagger = Dictionary(dog="NN", ball="NN")
    assert labels.extract(["a dog", "dog ball"], tagger) == ["dog", "dog", "ball"]


@pytest.mark.parametrize("caption", ["", "\n", "running quickly", "A background image of a person"])
def test_captions_without_nouns(caption):
    assert labels.extract(caption, "textblob") == []


def test_records():
    tagger = Dictionary(dog="NN")
    assert labels.of_record({"labels": [" Red fox ", ""]}, tagger) == ["Red fox"]
    assert labels.of_record({"labels": (), "txt": "a dog"}, tagger) == []  # ready labels win
    assert labels.of_record({"class_names": "tench, Tinca tinca"}) == ["tench", "tinca tinca"]
    assert labels.of_record({"txt": "a dog"}, tagger) == ["dog"]
    assert labels.of_record({"captions": ["dog", "dog"]}, tagger) == ["dog", "dog"]
    with pytest.raises(records.DataError, match="keys jpg has no text"):
        labels.of_record({"jpg": b""}, tagger)
    with pytest.raises(records.BadRecordError, match="caption is a int"):
        labels.of_record({"caption": 3}, tagger)
    with pytest.raises(records.BadRecordError, match="holds the delimiter"):
        labels.of_record({"labels": ["cup, tea"]}, tagger)
    with pytest.raises(records.BadRecordError, match="not a list of strings"):
        labels.of_record({"labels": "dog"}, tagger)


def test_class_names():
    assert labels.from_class_names("tench, Tinca tinca") == ["tench", "tinca tinca"]
    assert labels.from_class_names(" , ") == []


@pytest.mark.parametrize(
    "record",
    [
        {"labels": 5}, {"labels": None}, {"labels": [1]}, {"labels": {"a": 1}}, {"labels": "dog"},
        {"labels": ["\ud800"]}, {"class_names": 3}, {"class_names": ["dog"]},
        {"class_names": "cat, \udfff"}, {"caption": None}, {"captions": [["a"]]}, {"txt": b"a"},
        {"caption": float("nan")}, {}, {b"txt": "a", 3: 4}, {"captions": {"a": "b"}},
        {"txt": "a dog " * 20_000},
    ],
    ids=lambda record: repr(record)[:40],
)  # fmt: skip
def test_records_of_other_types_are_bad(record):
    with pytest.raises(records.BadRecordError) as caught:
        labels.of_record(record, Dictionary())
    assert len(str(caught.value)) < 500
