"""How well predicted labels match the references: by meaning, not by spelling.

Yue et al., arXiv 2312.02142, sec. 5. For an image with predictions g (N) and references r (M),
S[m, n] is the cosine of the vectors of two labels:

    recall     mean over references of the best prediction         S.max over n, mean over m
    precision  mean over predictions of the best reference         S.max over m, mean over n
    f1         harmonic mean of the two, of this image

and the result is the mean of each over images (f1 is not recomputed from the means). Nothing is
padded to k: fewer predictions raise the precision. No predictions, or no references, count as one
empty label. With a threshold, entries of S below it are 0: at 1 only equal labels count.

    diversity  mean and deviation of the cosines between the predictions of one image
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Embed = Callable[[Sequence[str]], np.ndarray]
Labels = Sequence[str]
_TOLERANCE = 1e-4  # of a threshold: the cosine of a label with itself is 1 up to rounding


@dataclasses.dataclass(frozen=True)
class Scores:
    """One value per image, float64[N]."""

    recall: np.ndarray
    precision: np.ndarray
    f1: np.ndarray
    div_avg: np.ndarray
    div_std: np.ndarray

    def means(self) -> dict[str, float]:
        """Means over images."""
        return {
            field.name: float(np.mean(getattr(self, field.name)))
            for field in dataclasses.fields(self)
        }


def match(
    predictions: Sequence[Labels],
    references: Sequence[Labels],
    embed: Embed,
    threshold: float | None = None,
) -> Scores:
    """Scores of every image. All labels are embedded in one call.

    Args:
      predictions, references: labels per image.
      embed: texts -> float[N, D] of unit length.
      threshold: see the module; None compares as it is.

    Raises:
      ValueError: numbers of images differ, or there is none.
    """
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    predictions, references = ([list(x) or [""] for x in y] for y in (predictions, references))
    words = list(dict.fromkeys(label for x in (*predictions, *references) for label in x))
    row = {word: index for index, word in enumerate(words)}
    vectors = np.asarray(embed(words), np.float64)
    rows = [
        score(vectors[[row[label] for label in p]], vectors[[row[label] for label in r]], threshold)
        for p, r in zip(predictions, references)
    ]
    return Scores(*np.array(rows).T)


def score(predicted_nd, reference_md, threshold: float | None = None) -> tuple[float, ...]:
    """(recall, precision, f1, div_avg, div_std) of one image, from unit vectors."""
    s_mn = reference_md @ predicted_nd.T
    if threshold is not None:
        s_mn = np.where(s_mn >= threshold - _TOLERANCE, s_mn, 0.0)
    recall, precision = s_mn.max(axis=1).mean(), s_mn.max(axis=0).mean()
    total = recall + precision
    f1 = 2 * recall * precision / total if total else 0.0
    return recall, precision, f1, *diversity(predicted_nd)


def diversity(vectors_nd) -> tuple[float, float]:
    """Mean and unbiased deviation of the cosines of different labels; 0 where undefined.

    As in the reference, a cosine of exactly 0 is left out.
    """
    cosines = np.triu(vectors_nd @ vectors_nd.T, 1)
    cosines = cosines[cosines != 0]
    average = cosines.mean() if len(cosines) else 0.0
    return average, cosines.std(ddof=1) if len(cosines) > 1 else 0.0
