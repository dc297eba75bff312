"""How near captions come to true ones: CIDEr-D, BLEU, ROUGE-L.

The formulas of Vedantam et al. (arXiv 1411.5726), Papineni et al. (ACL 2002) and Lin (2004), with
the choices of COCO's caption evaluation, whose numbers papers print: captions as lists of words
(`words`), frequencies of n-grams from the true captions of the very data that are scored.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence

import numpy as np

_SIGMA = 6.0  # of the penalty on another length, in CIDEr-D
_BETA = 1.2  # of ROUGE-L: recall counts more
_N = 4
_CONTRACTIONS = re.compile(r"(?i)(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_TOKENS = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-/.&]\w+)*|[$%]")

Words = Sequence[str]


def words(text: str) -> list[str]:
    """A caption as the words that count: small letters, no punctuation, contractions apart.

    What Stanford's tokenizer makes of usual captions: "don't" is do n't, "man's" is man 's.
    """
    spaced = _CONTRACTIONS.sub(r" \1", text.replace("\u2019", "'"))
    return _TOKENS.findall(spaced.lower())


def _ngrams(caption: Words, n: int) -> collections.Counter:
    return collections.Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1))


def cider_d(said: Sequence[Words], true: Sequence[Sequence[Words]]) -> np.ndarray:
    """CIDEr-D of every caption, float64[N]; papers print 100 times the mean.

    Args:
      said: a caption for each image.
      true: one or more true captions for each; they make the frequencies, too.
    """
    counted = [[_all_ngrams(caption) for caption in captions] for captions in true]
    documents: collections.Counter = collections.Counter()
    for captions in counted:
        documents.update({gram for grams in captions for gram in grams})
    total = math.log(max(len(true), 1))

    def vector(grams):
        """(tf-idf by gram, norm by n, length in pairs of words)."""
        weights = {
            gram: count * (total - math.log(max(1.0, documents[gram])))
            for gram, count in grams.items()
        }
        norms = [0.0] * _N
        for gram, weight in weights.items():
            norms[len(gram) - 1] += weight**2
        length = sum(count for gram, count in grams.items() if len(gram) == 2)
        return weights, [norm**0.5 for norm in norms], length

    scores = []
    for caption, captions in zip(said, counted, strict=True):
        mine = vector(_all_ngrams(caption))
        found = [_similarity(mine, vector(grams)) for grams in captions]
        scores.append(10.0 * float(np.mean(found)) if found else 0.0)
    return np.array(scores)


def _all_ngrams(caption):
    return sum((_ngrams(caption, n) for n in range(1, _N + 1)), collections.Counter())


def _similarity(said, true):
    (mine, my_norms, my_length), (theirs, norms, length) = said, true
    dots = [0.0] * _N
    for gram, weight in mine.items():
        other = theirs.get(gram, 0.0)
        dots[len(gram) - 1] += min(weight, other) * other
    penalty = math.exp(-((my_length - length) ** 2) / (2 * _SIGMA**2))
    parts = [dot / (a * b) if a and b else 0.0 for dot, a, b in zip(dots, my_norms, norms)]
    return penalty * sum(parts) / _N


def bleu_counts(said: Words, true: Sequence[Words]) -> np.ndarray:
    """float64[10]: length, nearest true length, and right and all n-grams for n of 1 to 4.

    Sums over a corpus go into `bleu`.
    """
    length = len(said)
    nearest = min((len(caption) for caption in true), key=lambda x: (abs(x - length), x))
    counts: list[float] = [length, nearest]
    for n in range(1, _N + 1):
        most: collections.Counter = collections.Counter()
        for caption in true:
            most |= _ngrams(caption, n)
        mine = _ngrams(said, n)
        counts += [sum((mine & most).values()), sum(mine.values())]
    return np.array(counts, np.float64)


def bleu(counts_k: np.ndarray, n: int = _N) -> float:
    """BLEU up to n-grams of n words, of sums of `bleu_counts`; not smoothed."""
    length, nearest, *pairs = np.asarray(counts_k, np.float64).tolist()
    right, every = pairs[: 2 * n : 2], pairs[1 : 2 * n : 2]
    if min(right) == 0:
        return 0.0
    logs = sum(math.log(a / b) for a, b in zip(right, every)) / n
    return math.exp(min(0.0, 1 - nearest / length) + logs)


def rouge_l(said: Words, true: Sequence[Words]) -> float:
    """ROUGE-L of the longest common subsequence; best precision, best recall of the true ones."""
    if not said or not any(true):
        return 0.0
    common = [_common(said, caption) for caption in true]
    precision = max(x / len(said) for x in common)
    recall = max(x / len(caption) for x, caption in zip(common, true) if caption)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, best[j] = best[j], before + 1 if word == other else max(best[j], best[j - 1])
    return best[-1]
