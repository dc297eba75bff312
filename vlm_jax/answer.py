"""What a system says about one input, and what is true of it: one class for both.

The formatters of systems make answers of a network's outputs and put the true one beside every
example; metrics compare two of them, drawings show one, `predict` and the files of evaluations
write one a line. So nothing on the people's side knows a paper.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

KINDS = ("box", "point", "mask")


@dataclasses.dataclass(frozen=True)
class Rle:
    """A mask in COCO's compressed run lengths, as `pycocotools.mask` has it.

    Attributes:
      size: height and width in pixels.
      counts: the runs, column by column, as COCO's text.
    """

    size: tuple[int, int]
    counts: str


@dataclasses.dataclass(frozen=True)
class Span:
    """Characters of a text that stand for something in the picture.

    Attributes:
      start, end: in `Answer.text`; the character at `end` is not part of it.
      kind: "box", "point" or "mask".
      index: which of the answer's.
    """

    start: int
    end: int
    kind: str
    index: int


def _none(columns: int) -> Any:
    return dataclasses.field(default_factory=lambda: np.zeros((0, columns), np.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What is said, or what is true. Empty fields: not asked, or not said.

    Pixels are those of the picture as it was given, edges not centres, x before y.

    Attributes:
      text: of the answer.
      labels: (label, score), the best first.
      boxes_xyxy_px: float32[K, 4]. points_xy_px: float32[K, 2].
      masks: of the picture's size.
      images: float32[H, W, 3] in 0..1 each; not rounded to bytes, as errors are measured on them.
      scores: float32[K] of the boxes, masks, points or texts.
      spans: what parts of the text stand for.
      problem: why it could not be read; counted, never dropped.

    Raises:
      ValueError: arrays of other shapes, numbers of scores that fit nothing, spans outside the text
        or of things that are not there.
    """

    text: str = ""
    labels: tuple[tuple[str, float], ...] = ()
    boxes_xyxy_px: np.ndarray = _none(4)
    points_xy_px: np.ndarray = _none(2)
    masks: tuple[Rle, ...] = ()
    images: tuple[np.ndarray, ...] = ()
    scores: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    spans: tuple[Span, ...] = ()
    problem: str = ""

    def __post_init__(self):
        for name, columns in (("boxes_xyxy_px", 4), ("points_xy_px", 2)):
            rows = np.asarray(getattr(self, name), np.float32)
            if rows.ndim != 2 or rows.shape[1] != columns:
                raise ValueError(f"{name} is of shape {list(rows.shape)}, not [K, {columns}]")
            object.__setattr__(self, name, rows)
        object.__setattr__(self, "scores", np.asarray(self.scores, np.float32).reshape(-1))
        for name in ("masks", "images", "spans"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        labels = tuple((str(label), float(score)) for label, score in self.labels)
        object.__setattr__(self, "labels", labels)
        count = {
            "box": len(self.boxes_xyxy_px),
            "point": len(self.points_xy_px),
            "mask": len(self.masks),
        }
        if len(self.scores) and len(self.scores) not in (1, *count.values(), len(self.images)):
            raise ValueError(f"{len(self.scores)} scores of {count} and {len(self.images)} images")
        for span in self.spans:
            if span.kind not in count or not 0 <= span.index < count[span.kind]:
                raise ValueError(f"{span}: the answer has {count}")
            if not 0 <= span.start <= span.end <= len(self.text):
                raise ValueError(f"{span}: the text has {len(self.text)} characters")

    def __eq__(self, other: Any) -> bool:
        """Whether all fields are equal; of arrays, every number (NaN is equal to NaN)."""
        if not isinstance(other, Answer):
            return NotImplemented
        return all(
            _same(getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        )

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, Any]:
        """What is said, as JSON takes it; images, which are files of their own, are left out.

        Numbers that JSON lacks (NaN, infinity) become null.
        """
        found = {
            "text": self.text,
            "labels": [[label, _number(score)] for label, score in self.labels],
            "boxes_xyxy_px": [[_number(x) for x in box] for box in self.boxes_xyxy_px],
            "points_xy_px": [[_number(x) for x in point] for point in self.points_xy_px],
            "masks": [{"size": list(mask.size), "counts": mask.counts} for mask in self.masks],
            "scores": [_number(x) for x in self.scores],
            "spans": [dataclasses.asdict(span) for span in self.spans],
            "problem": self.problem,
        }
        return {key: value for key, value in found.items() if value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Answer:
        """The answer of `to_json`; keys that it does not know are somebody else's.

        Raises:
          ValueError: a value of another form, named.
        """
        known = {key: values[key] for key in _READERS if key in values}
        fields: dict[str, Any] = {}
        for key, value in known.items():
            try:
                fields[key] = _READERS[key](value)
            except (TypeError, KeyError, ValueError, IndexError) as error:
                raise ValueError(f"{key}={value!r:.80} is not what an answer has there") from error
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Host:
    """What stays on the host of one example, for those who compare and show.

    Attributes:
      truth: what is true of it; an empty answer where nothing is known.
      id: name of its record; of a packed row, those of its records.
      size: height and width of the picture as it was given; (0, 0) without one.
      images: uint8[H, W, 3] each, as the network sees them: the picture, or those of a prompt.
      caption: what is given and asked, in words.
      output: path, relative to the folder of results, that the record asks for.
      tags: numbers that results are grouped by, for example {"label": 3, "fold": 0};
        -1 where it is not known.
    """

    truth: Answer = dataclasses.field(default_factory=Answer)
    id: str = ""
    size: tuple[int, int] = (0, 0)
    images: tuple[np.ndarray, ...] = ()
    caption: str = ""
    output: str = ""
    tags: Mapping[str, int] = dataclasses.field(default_factory=dict)


def _number(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b, equal_nan=True)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _rows(values: Sequence[Sequence[Any]], columns: int) -> np.ndarray:
    rows = np.array([[_float(x) for x in row] for row in values], np.float32)
    return rows if len(values) else np.zeros((0, columns), np.float32)


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_READERS = {
    "text": _text,
    "labels": lambda rows: tuple((_text(label), _float(score)) for label, score in rows),
    "boxes_xyxy_px": lambda rows: _rows(rows, 4),
    "points_xy_px": lambda rows: _rows(rows, 2),
    "masks": lambda rows: tuple(
        Rle((int(row["size"][0]), int(row["size"][1])), _text(row["counts"])) for row in rows
    ),
    "scores": lambda row: np.array([_float(x) for x in row], np.float32),
    "spans": lambda rows: tuple(
        Span(int(row["start"]), int(row["end"]), _text(row["kind"]), int(row["index"]))
        for row in rows
    ),
    "problem": _text,
}
