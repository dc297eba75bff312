"""Token ids and probabilities -> ranked labels, on the host.

Yue et al., arXiv 2312.02142, sec. 3.3. A label's score is the product of the probabilities of its
tokens, the delimiter's included; labels that decode to the same text are one, with the sum. So the
k labels are chosen by their first token and ordered by all of their tokens.

    ids    so fa ,  cat ,  so fa ,            groups      so fa ,   cat ,   so fa ,
    probs  .5 .8 .5 .3 .5  .1 .9 1.           labels      sofa .29          cat .15

`reference=True` repeats the released program instead, to compare with its numbers:

    its labels after one that met the limit get their neighbours' probabilities, and the last of
    them vanish (it appends a delimiter to the tokens, but nothing to the probabilities);
    "ppl" sorts by the inverse of the perplexity, so that the unlikeliest come first;
    the empty label is listed; scores have five decimals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Group:
    """The tokens of one label.

    Attributes:
      ids, probs: of equal length, the delimiter included.
      complete: the delimiter came. Without it the label was cut off by the limit.
    """

    ids: tuple[int, ...]
    probs: tuple[float, ...]
    complete: bool = True


@dataclasses.dataclass(frozen=True)
class Label:
    """A text, its score under the ranking that was asked for, and whether it was cut off."""

    text: str
    score: float
    complete: bool = True


def _product(groups, cosines):
    return sum(math.prod(group.probs) for group in groups)


def _first(groups, cosines):
    return sum(group.probs[0] for group in groups)


def _log_mean(group):
    return float(np.log(np.asarray(group.probs, np.float64)).mean())


def _perplexity(groups, cosines):
    return min(math.exp(-_log_mean(group)) for group in groups)


def _inverse_perplexity(groups, cosines):
    return min(math.exp(_log_mean(group)) for group in groups)


def _mean_over_groups(score):
    return lambda groups, cosines: float(np.mean([score(cosines(g.ids)) for g in groups]))


def _harmonic(cosines_tp):
    recall, precision = cosines_tp.max(axis=1).mean(), cosines_tp.max(axis=0).mean()
    return 2 * recall * precision / (recall + precision)


_RANKINGS = {  # name -> (score of a label's groups, whether the largest comes first)
    "prob": (_product, True),
    "first": (_first, True),
    "none": (lambda groups, cosines: 0.0, True),
    "ppl": (_perplexity, False),
    # Distances between unit vectors, halved to lie in [0, 1].
    "sim_mean": (
        _mean_over_groups(lambda c: np.sqrt(np.maximum(2 - 2 * c, 0)).mean() / 2),
        False,
    ),
    "sim_max": (_mean_over_groups(lambda c: c.max(axis=1).mean()), True),
    "sim_max_f": (_mean_over_groups(_harmonic), True),
}
RANKINGS = tuple(_RANKINGS)


def rank(
    groups: Iterable[Group],
    decode: Callable[[Sequence[int]], str],
    *,
    delimiter_id: int,
    by: str = "prob",
    cosines: Callable[[Sequence[int]], np.ndarray] | None = None,
    unfinished: bool = False,
    reference: bool = False,
) -> list[Label]:
    """Merges the groups of one image by their text and sorts them.

    Args:
      groups: in the order of generation; ties keep it.
      decode: ids -> text.
      delimiter_id: its text and white space are stripped from the labels.
      by: "prob", "first" (probability of the first token), "none" (order of generation), "ppl"
        (perplexity), or similarity of the label's token vectors to the image's: "sim_mean"
        (distance over all pairs), "sim_max" (cosine with the nearest of the image's), "sim_max_f"
        (harmonic mean of that in both directions).
      cosines: for the similarities, see `cosines_with`.
      unfinished: list labels that were cut off, marked.
      reference: see the top of this file; cut-off labels are then what `reference_groups` gives.

    Returns:
      Labels, the best first.

    Raises:
      ValueError: unknown ranking; a similarity without `cosines`.
    """
    if by not in _RANKINGS:
        raise ValueError(f"ranking {by!r} is none of {', '.join(RANKINGS)}")
    if by.startswith("sim") and cosines is None:
        raise ValueError(f"ranking {by!r} compares with the image: give `cosines`")
    score, largest_first = _RANKINGS[by]
    if reference and by == "ppl":
        score = _inverse_perplexity
    delimiter = decode([delimiter_id]).strip()
    by_text: dict[str, list[Group]] = {}
    for group in groups:
        text = decode(list(group.ids)).strip(delimiter if reference else delimiter + " \n\t")
        if reference or (text and (group.complete or unfinished)):
            by_text.setdefault(text, []).append(group)
    labels = [
        Label(text, float(score(same, cosines)), any(group.complete for group in same))
        for text, same in by_text.items()
    ]
    labels.sort(key=lambda label: label.score, reverse=largest_first)
    if reference:
        labels = [dataclasses.replace(x, score=round(x.score, 5)) for x in labels]
    return labels


def rank_all(
    found: Any, decode: Callable[[Sequence[int]], str], *, delimiter_id: int, **options: Any
) -> list[list[Label]]:
    """`rank` for every image of a `one_shot.OneShot`; `options` as there, `cosines` excepted.

    Args:
      found: arrays on the device or the host.
      options: `cosines` is a sequence with one function per image.
    """
    split = reference_groups if options.get("reference") else one_shot_groups
    cosines = options.pop("cosines", None)
    arrays = [np.asarray(x) for x in (found.ids_bkt, found.probs_bkt, found.lengths_bk)]
    return [
        rank(
            split(*rows, delimiter_id),
            decode,
            delimiter_id=delimiter_id,
            cosines=None if cosines is None else cosines[i],
            **options,
        )
        for i, rows in enumerate(zip(*arrays))
    ]


def one_shot_groups(
    ids_kt: np.ndarray, probs_kt: np.ndarray, lengths_k: np.ndarray, delimiter_id: int
) -> list[Group]:
    """The labels of one image of a `one_shot.OneShot`."""
    return [
        Group(tuple(ids[:n].tolist()), tuple(probs[:n].tolist()), ids[n - 1] == delimiter_id)
        for ids, probs, n in zip(ids_kt, probs_kt, lengths_k)
    ]


def reference_groups(
    ids_kt: np.ndarray, probs_kt: np.ndarray, lengths_k: np.ndarray, delimiter_id: int
) -> list[Group]:
    """The same as the released program pairs them; differs when a label was cut off."""
    groups = one_shot_groups(ids_kt, probs_kt, lengths_k, delimiter_id)
    ids = [t for g in groups for t in (*g.ids, *(() if g.complete else (delimiter_id,)))]
    probs = [p for g in groups for p in g.probs]
    return sequence_groups(ids[: len(probs)], probs, delimiter_id)


def sequence_groups(
    ids_t: Sequence[int], probs_t: Sequence[float], delimiter_id: int
) -> list[Group]:
    """A sequence of labels, cut at its delimiters; what follows the last one is dropped."""
    ids, probs = np.asarray(ids_t).tolist(), np.asarray(probs_t).tolist()
    groups, start = [], 0
    for end, token in enumerate(ids, 1):
        if token == delimiter_id:
            groups.append(Group(tuple(ids[start:end]), tuple(probs[start:end])))
            start = end
    return groups


def cosines_with(
    table_vd: np.ndarray, image_pd: np.ndarray
) -> Callable[[Sequence[int]], np.ndarray]:
    """ids -> cosines_tp between their input vectors and those of one image (no class token)."""
    image_pd = _unit(image_pd)
    return lambda ids: _unit(table_vd[np.asarray(ids)]) @ image_pd.T


def _unit(x_td):
    x_td = np.asarray(x_td, np.float32)
    return x_td / np.linalg.norm(x_td, axis=-1, keepdims=True)
