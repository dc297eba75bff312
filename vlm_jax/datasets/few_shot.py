"""Few-shot prompts from any data set: k pairs of (image, answer), a query, and its answer.

    answer    of a record of the data set                         image of the pair
    mask      `mask` bool[H, W], or the union of `masks`          image_u8
    box       the bounding box of that mask, filled               image_u8
    colour    image_u8                                            its grey version
    picture   `answer_u8`                                         image_u8

Masks are white on black. Where the data set has `labels` (one int per record), the pairs are drawn
from those of the query's label. Prompt i is the same everywhere: drawn from (seed, i).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.data import images, records, sources

ANSWERS = ("mask", "box", "colour", "picture")


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Random-access source of {"prompt", "target", "label", "fold", "id"}.

    Args:
      queries: fields of the source of queries, for example dict(type="pascal5i", path=...).
      answer: see the module.
      shots: pairs in front of the query.
      examples: fields of the source of the pairs; empty takes the queries themselves, of course
        without the one that is asked for.
      seed: of the draw.

    Raises:
      DataError: unknown answer, or a label with too few examples.
    """

    queries: Mapping[str, Any]
    answer: str
    shots: int = 1
    examples: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self):
        if self.answer not in ANSWERS:
            raise records.DataError(f"answer={self.answer!r} is not one of {', '.join(ANSWERS)}")
        if self.shots < 1:
            raise records.DataError(f"shots={self.shots} must be at least 1")
        for label, pool in self._pools.items():
            spare = len(pool) - (self._same and label in self._labels[0])
            if label in self._labels[0] and spare < self.shots:
                raise records.DataError(
                    f"label {label}: {len(pool)} records cannot give {self.shots} examples of a "
                    f"query; lower shots"
                )
        if lacking := sorted(self._labels[0] - set(self._pools)):
            raise records.DataError(f"the queries have labels {lacking}, and the examples do not")

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, index: int) -> records.Record:
        label = self._label(self._queries, index)
        pool = self._pools[label]
        if self._same:
            pool = pool[pool != index]
        rng = np.random.default_rng([self.seed, index])
        chosen = rng.choice(pool, self.shots, replace=False)
        query = self._queries[index]
        pairs = [self._pair(self._examples[int(i)]) for i in chosen]
        image, answer = self._pair(query)
        return {
            "prompt": [picture for pair in pairs for picture in pair] + [image],
            "target": [answer],
            "label": query.get("label", -1),
            "fold": query.get("fold", -1),
            "id": self.record_id(index),
        }

    def record_id(self, index: int) -> str:
        """That of the query."""
        return self._queries.record_id(index)

    def fingerprint(self) -> None:
        """None: derived values are not kept."""

    @functools.cached_property
    def _queries(self) -> sources.Source:
        return sources.make_source(**self.queries)

    @functools.cached_property
    def _examples(self) -> sources.Source:
        return sources.make_source(**self.examples) if self.examples else self._queries

    @property
    def _same(self) -> bool:
        return not self.examples

    @functools.cached_property
    def _labels(self) -> tuple[set[int], np.ndarray]:
        """Labels of the queries, and the label of every example."""
        of_queries = {self._label(self._queries, i) for i in range(len(self._queries))}
        of_examples = [self._label(self._examples, i) for i in range(len(self._examples))]
        return of_queries, np.array(of_examples, np.int64)

    @functools.cached_property
    def _pools(self) -> dict[int, np.ndarray]:
        labels = self._labels[1]
        return {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}

    def _label(self, source: sources.Source, index: int) -> int:
        labels = getattr(source, "labels", None)
        return 0 if labels is None else int(labels[index])

    def _pair(self, record: records.Record) -> tuple[np.ndarray, np.ndarray]:
        image = images.of_record(record)
        if self.answer == "colour":
            return images.grey_u8(image), image
        if self.answer == "picture":
            if "answer_u8" not in record:
                raise records.BadRecordError(f"no answer_u8 among {records.keys_of(record)}")
            return image, record["answer_u8"]
        if not {"mask", "masks"} & record.keys():
            raise records.BadRecordError(f"no mask or masks among {records.keys_of(record)}")
        mask = record["mask"] if "mask" in record else np.any(record["masks"], axis=0)
        if not mask.any():
            raise records.BadRecordError("the mask is empty")
        return image, paint(box_mask(mask) if self.answer == "box" else mask)


def make_source(**fields) -> FewShot:
    """For `type="few_shot"` in a config."""
    return FewShot(**fields)


def paint(mask: np.ndarray) -> np.ndarray:
    """bool[H, W] -> uint8[H, W, 3], white on black."""
    return np.repeat(np.where(mask, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)


def box_mask(mask: np.ndarray) -> np.ndarray:
    """The bounding box of a mask, filled."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    filled = np.zeros_like(mask)
    filled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return filled
