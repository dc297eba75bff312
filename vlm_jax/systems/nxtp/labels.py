"""Captions to labels: the nouns that NXTP learns to name and is scored against.

Yue et al., arXiv 2312.02142, sec. 4.1; upstream: src/utils.py and src/dataset.py. The same rules
make training labels and evaluation references:

    clean    lower case; every occurrence of a word of REMOVED, even inside another word, becomes a
             space; then only letters, digits and ' . - remain
    tag      tokens with Penn tags, by a Tagger
    nouns    tags NN and NNS, no digit in the word, each word once
    lemma    the singular; a label of one or two letters is dropped

What follows from this order, and is kept because the released models learned it: "laptop" gives
"lap" and "today" gives nothing, "dog" and "dogs" together give "dog" twice, and the entries
"persons" and "images" never match, since "person" and "image" are removed before them.

Taggers:

    nltk      the reference's: Punkt, averaged perceptron, WordNet. Its data come from NLTK's own
              index, once. Agrees with the reference on all 20 captions of tests/golden.
    textblob  needs PyPI only: the lexicon tagger of textblob and the lemmas of lemminflect, another
              tagger than the reference's. On the 20 golden captions, which were chosen to be hard,
              11 give the same labels (precision 0.89, recall 0.91 over labels); on 120 plain
              captions 62 do (0.95, 0.87). 30 times as fast as spaCy's small model, which gives 12
              and 64.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from vlm_jax.data import records

# upstream: src/dataset.py at its newest commit. Order matters.
REMOVED = (
    "person", "persons", "stock", "illustration", "foreground", "background", "photography",
    "image", "images", "front", "day", "ounce", "top",
)  # fmt: skip
# Paper sec. 4.1: the list before "foreground" and "top" were added; released models say "top".
REMOVED_IN_PAPER = (
    "person", "persons", "stock", "image", "images", "background", "ounce", "illustration",
    "front", "photography", "day",
)  # fmt: skip
NOUN_TAGS = ("NN", "NNS")
MIN_LETTERS = 3
MAX_CAPTION = 100_000  # letters; a longer text is not about one picture, and takes long to tag
DELIMITER = ","
TAGGERS = ("nltk", "textblob")

_UNWANTED = re.compile(r"[^a-zA-Z' 0-9.,&-]")
_SPACES = re.compile(r"\s+")
_NEW_NLTK = (3, 8, 2)  # the first whose data files are not pickles and have other names
_lock = threading.Lock()


class Tagger(Protocol):
    """Tokens with Penn tags, and singulars."""

    def tag(self, text: str) -> list[tuple[str, str]]:
        """(word, tag) of every token."""

    def lemma(self, noun: str) -> str:
        """The dictionary form of a noun; the word itself when it is not known."""


def extract(
    caption: str | Sequence[str],
    tagger: str | Tagger = "nltk",
    *,
    removed: Sequence[str] = REMOVED,
) -> list[str]:
    """The labels of a caption, in order of first occurrence; [] when it has no noun.

    The reference shuffles them. Several captions are taken one after the other, and a label that
    two of them have comes twice.

    Args:
      caption: one, or several of one picture.
      tagger: a name of `TAGGERS`, or an object.
      removed: see the module.

    Raises:
      MissingExtraError, DataError: the tagger or its data are not installed; says what to do.
    """
    tagger = make_tagger(tagger) if isinstance(tagger, str) else tagger
    captions = [caption] if isinstance(caption, str) else caption
    return [
        label
        for text in captions
        for label in from_tagged(tagger.tag(clean(text, removed)), tagger.lemma)
    ]


def of_record(record: Mapping[str, Any], tagger: str | Tagger = "nltk") -> list[str]:
    """The labels of a record: `labels`, `class_names`, or nouns of `caption`, `captions` or `txt`.

    Raises:
      BadRecordError: none of these keys, a value of another type, a label with the delimiter in
        it, text that no file can hold, or captions of more than `MAX_CAPTION` letters.
    """
    if "labels" in record:
        return _ready(record["labels"])
    if "class_names" in record:
        return _encodable(from_class_names(_text(record, "class_names")))
    key = next((key for key in ("caption", "captions", "txt") if key in record), None)
    if key is None:
        raise records.BadRecordError(
            f"a record with the keys {', '.join(records.keys_of(record))} has no text; one of "
            "labels, class_names, caption, captions, txt is needed"
        )
    captions = record[key] if _are_strings(record[key]) else [_text(record, key)]
    if (length := sum(map(len, captions))) > MAX_CAPTION:
        raise records.BadRecordError(f"{key} of {length} letters; at most {MAX_CAPTION} are read")
    return extract(captions, tagger)


def from_class_names(names: str) -> list[str]:
    """ImageNet's synonyms: "tench, Tinca tinca" -> ["tench", "tinca tinca"].

    Ours: spaces around a name are dropped; upstream they stay in the training text.
    """
    return [name for name in (part.strip() for part in names.lower().split(DELIMITER)) if name]


def clean(caption: str, removed: Sequence[str] = REMOVED) -> str:
    """The text that is tagged; see the module."""
    text = caption.lower().replace("\n", " ")
    for word in removed:
        text = text.replace(word, " ")
    text = _UNWANTED.sub("", text).replace(",", " ").replace("&", " ")
    return _SPACES.sub(" ", text).strip()


def from_tagged(tagged: Iterable[tuple[str, str]], lemma) -> list[str]:
    """Tagged tokens -> labels. Words are made unique before they are made singular."""
    words = dict.fromkeys(word for word, tag in tagged if tag in NOUN_TAGS and not _digits(word))
    return [label for label in map(lemma, words) if len(label) >= MIN_LETTERS]


def make_tagger(name: str) -> Tagger:
    """The tagger of this name; loaded once per process.

    Raises:
      MissingExtraError: its package is not installed.
      DataError: unknown name, or its data are not on this machine.
    """
    if name not in TAGGERS:
        raise records.DataError(f"no tagger {name!r}; known: {', '.join(TAGGERS)}")
    with _lock:  # the threads of the pipeline all ask at once
        return _make_tagger(name)


@functools.cache
def _make_tagger(name: str) -> Tagger:
    return {"nltk": _Nltk, "textblob": _TextBlob}[name]()


class _Nltk:
    """The reference's tagger."""

    def __init__(self):
        nltk = records.require("nltk", "labels")
        try:
            # Not nltk.pos_tag, which reads the model anew for every text.
            self._tagger = nltk.tag.perceptron.PerceptronTagger()
            self._tokenize = nltk.word_tokenize
            self._lemmatizer = nltk.stem.WordNetLemmatizer()
            # Its readers load at first use, and not safely from several threads.
            self.tag("a dog. two cats")
            self.lemma("dogs")
        except LookupError as error:
            version = tuple(int(part) for part in re.findall(r"\d+", nltk.__version__)[:3])
            names = (
                "punkt_tab averaged_perceptron_tagger_eng wordnet"
                if version >= _NEW_NLTK
                else "punkt averaged_perceptron_tagger wordnet omw-1.4"
            )
            raise records.DataError(
                f"NLTK {nltk.__version__} lacks its data. Remedy:\n"
                f"    python -m nltk.downloader {names}\n"
                "(or set NLTK_DATA to a folder that has them), or tagger='textblob', which needs "
                "no data and labels slightly differently"
            ) from error

    def tag(self, text):
        return self._tagger.tag(self._tokenize(text))

    def lemma(self, noun):
        return self._lemmatizer.lemmatize(noun, "n")


class _TextBlob:
    """The offline tagger."""

    def __init__(self):
        self._tag = records.require("textblob.en", "labels").tag
        self._lemmas = records.require("lemminflect", "labels").getLemma
        # Tables load at first use, those of unknown words apart, and not safely from threads.
        self.tag("two dogs")
        self.lemma("dogs")
        self.lemma("blorptions")

    def tag(self, text):
        return [(word, tag) for word, tag in self._tag(text)] if text else []

    def lemma(self, noun):
        # Of several singulars the shortest, as NLTK does.
        return min(self._lemmas(noun, "NOUN"), key=len, default=noun)


def _ready(labels: Any) -> list[str]:
    if not _are_strings(labels):
        raise records.BadRecordError(f"labels is {labels!r:.80}, not a list of strings")
    labels = [label for label in (label.strip() for label in labels) if label]
    for label in labels:
        if DELIMITER in label:
            raise records.BadRecordError(
                f"the label {label!r:.80} holds the delimiter {DELIMITER!r}; split it into several"
            )
    return _encodable(labels)


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise records.BadRecordError(f"{key} is a {type(record[key]).__name__}, not text")
    return record[key]


def _encodable(labels: list[str]) -> list[str]:
    """JSON can name halves of letters ("\\ud800") that no other text holds."""
    for label in labels:
        try:
            label.encode()
        except UnicodeEncodeError as error:
            raise records.BadRecordError(f"the label {label!r:.80} is not Unicode text") from error
    return labels


def _are_strings(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def _digits(word: str) -> bool:
    return any(letter.isdigit() for letter in word)
