"""Annotations of images: COCO's JSON, our own, and masks as run lengths.

    annotations.load("instances.json")["0001.jpg"]      -> (Thing, Thing, ...)

The file is COCO's (images, annotations, categories), or a list of our own form:

    [{"image": "a/1.jpg", "objects": [{"label": 3, "box": [x0, y0, x1, y1], "polygons": [[x, y,
      x, y, ...]], "keypoints": [[x, y, visible], ...], "rle": {"size": [h, w], "counts": ...}}]}]

Labels count from 1; the classes of a COCO file are numbered by rank of their id. Run lengths and
COCO's way to fill polygons are those of `pycocotools`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from vlm_jax import answer
from vlm_jax.data import records, shard_files

MAX_COORDINATE = 1e5  # pixels; whoever draws follows a line through all of its points, seen or not
_MAX_BYTES = 2**31  # of a file of annotations; all of COCO's are 0.5e9
_RUN_LETTERS = 7  # of a number in compressed RLE: 35 bits


@dataclasses.dataclass(frozen=True)
class Thing:
    """One annotated object; what is not known is empty.

    Attributes:
      label: class, from 1.
      box: x0, y0, x1, y1 in pixels.
      keypoints: (x, y, visible) of each point; drawn when visible > 0.
      polygons: x, y, x, y, ... of each.
      rle: COCO's {"size": [h, w], "counts": numbers or text}.
      problem: why it cannot be drawn; "" when nothing is known against it.
    """

    label: int = 1
    box: tuple[float, ...] = ()
    keypoints: tuple[tuple[float, ...], ...] = ()
    polygons: tuple[tuple[float, ...], ...] = ()
    rle: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""

    def has(self, kind: str) -> bool:
        """Whether there is something to draw of this kind."""
        if self.problem:
            return True
        if kind == "boxes":
            return bool(self.box)
        if kind == "masks":
            return bool(self.polygons or self.rle)
        return any(visible > 0 for _, _, visible in self.keypoints)


@functools.cache
def load(path: str) -> dict[str, tuple[Thing, ...]]:
    """Image name -> objects of a JSON file.

    Raises:
      DataError: a file that is not of a form in the module's docstring.
    """
    try:
        text = shard_files.read_bytes(os.path.expanduser(path), _MAX_BYTES)
    except records.BadRecordError as error:
        raise records.DataError(str(error)) from error
    try:
        content = records.parse_json(text)
        made = _from_coco(content) if isinstance(content, dict) else _from_list(content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise records.DataError(
            f"{path}: neither COCO annotations nor a list of images with objects: "
            f"{type(error).__name__}: {error!s:.200}"
        ) from error
    return {name: tuple(things) for name, things in made.items()}


def _from_coco(content: Mapping[str, Any]) -> dict[str, list[Thing]]:
    for kind in ("categories", "images"):
        counts = collections.Counter(entry["id"] for entry in content.get(kind, ()))
        if twice := [number for number, count in counts.items() if count > 1]:
            raise ValueError(f"the id {twice[0]!r:.40} comes twice among {kind}")
    ranks = sorted(category["id"] for category in content.get("categories", ()))
    label = {number: rank for rank, number in enumerate(ranks, 1)}
    names = {image["id"]: _name(image["file_name"]) for image in content["images"]}
    made: dict[str, list[Thing]] = {name: [] for name in names.values()}
    for entry in content["annotations"]:
        made[names[entry["image_id"]]].append(_checked(_coco_thing, entry, label))
    return made


def _coco_thing(entry: Mapping[str, Any], label: Mapping[Any, int]) -> Thing:
    shape = entry.get("segmentation") or ()
    box = _numbers(entry.get("bbox") or (), "bbox")
    if box:
        x, y, width, height = box
        box = (x, y, x + width, y + height)
    flat = _numbers(entry.get("keypoints") or (), "keypoints")
    category = entry.get("category_id")
    if label and category is not None and category not in label:
        raise ValueError(f"category {category!r:.40} is not among the categories")
    return Thing(
        label=label.get(category, 1),
        box=box,
        keypoints=tuple(flat[i : i + 3] for i in range(0, len(flat), 3)),
        polygons=() if isinstance(shape, Mapping) else tuple(map(tuple, shape)),
        rle=shape if isinstance(shape, Mapping) else {},
    )


def _from_list(content: Sequence[Mapping[str, Any]]) -> dict[str, list[Thing]]:
    made: dict[str, list[Thing]] = {}
    for image in content:
        things = made.setdefault(_name(image["image"]), [])
        for entry in image["objects"]:
            if unknown := sorted(set(entry) - _KEYS):
                raise KeyError(f"object with {unknown[0]!r:.40}; known: {', '.join(sorted(_KEYS))}")
            things.append(_checked(_own_thing, entry))
    return made


_KEYS = {"label", "box", "keypoints", "polygons", "rle"}


def _own_thing(entry: Mapping[str, Any]) -> Thing:
    return Thing(
        label=entry.get("label", 1),
        box=tuple(entry.get("box", ())),
        keypoints=tuple(map(tuple, entry.get("keypoints", ()))),
        polygons=tuple(map(tuple, entry.get("polygons", ()))),
        rle=entry.get("rle", {}),
    )


def _checked(make, *arguments: Any) -> Thing:
    """The object, or one that says why it cannot be drawn: one odd annotation is one bad record."""
    try:
        thing = make(*arguments)
        _check(thing)
        return thing
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return Thing(problem=f"{type(error).__name__}: {error!s:.200}")


def _check(thing: Thing) -> None:
    """Raises ValueError for shapes and numbers that cannot be drawn."""
    if type(thing.label) is not int:
        raise ValueError(f"label {thing.label!r:.40} is no integer")
    if len(_numbers(thing.box, "box")) not in (0, 4):
        raise ValueError(f"a box of {len(thing.box)} numbers")
    if thing.box and (thing.box[2] < thing.box[0] or thing.box[3] < thing.box[1]):
        raise ValueError(f"the box {thing.box} ends before it begins")
    for point in thing.keypoints:
        if len(_numbers(point, "keypoints")) != 3:
            raise ValueError("keypoints are not x, y, visible each")
    for polygon in thing.polygons:
        if len(_numbers(polygon, "polygon")) % 2 or len(polygon) < 4:
            raise ValueError(f"a polygon of {len(polygon)} numbers")
    if not isinstance(thing.rle, Mapping):
        raise ValueError(f"rle {thing.rle!r:.40} is no {{size, counts}}")


def _numbers(values: Any, name: str) -> tuple[float, ...]:
    values = tuple(values)
    for value in values:
        if type(value) not in (int, float) or not -MAX_COORDINATE <= value <= MAX_COORDINATE:
            raise ValueError(f"{name} {value!r:.40} is no number within {MAX_COORDINATE:,.0f}")
    return values


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"image {value!r:.40} is not called by text")
    return value


# ---- masks -------------------------------------------------------------------------------------


def encode_rle(mask_yx: np.ndarray) -> answer.Rle:
    """A mask as compressed run lengths.

    Args:
      mask_yx: bool or 0 and 1, [H, W].

    Raises:
      ValueError: another shape or other values.
    """
    mask_yx = np.asarray(mask_yx)
    if mask_yx.ndim != 2:
        raise ValueError(f"a mask of shape {list(mask_yx.shape)}, not [height, width]")
    if mask_yx.dtype != bool:
        if not np.isin(mask_yx, (0, 1)).all():
            raise ValueError("a mask holds other values than 0 and 1; compare with a threshold")
        mask_yx = mask_yx.astype(bool)
    found = coco_mask.encode(np.asfortranarray(mask_yx, np.uint8))
    return answer.Rle(mask_yx.shape, found["counts"].decode())


def decode(rle: answer.Rle) -> np.ndarray:
    """bool[H, W] of `encode_rle`.

    Raises:
      ValueError: runs that are not of its size.
    """
    return decode_rle(rle.counts, *rle.size)


def decode_rle(counts: Sequence[int] | str, height: int, width: int) -> np.ndarray:
    """COCO's run lengths, column by column, zeros first; as numbers or as compressed text.

    Returns:
      bool[height, width].

    Raises:
      ValueError: the runs are not height * width pixels, or the text is not as COCO writes it.
    """
    pixels = height * width
    if len(counts) > _RUN_LETTERS * (pixels + 2):
        raise ValueError(f"RLE of {len(counts)} counts, image of {pixels} pixels")
    if isinstance(counts, str):
        return _decode_text(counts, height, width)
    runs = list(counts)
    if not set(map(type, runs)) <= {int}:
        raise ValueError("RLE counts are not integers")
    if sum(runs) != pixels or min(runs, default=0) < 0:
        raise ValueError(f"RLE of {sum(runs)} pixels, image of {pixels}")
    packed = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return coco_mask.decode(packed).astype(bool)


def _decode_text(counts: str, height: int, width: int) -> np.ndarray:
    # Characters "0" to "o" are all that there is; the library follows others anywhere.
    if odd := next((x for x in counts if not "0" <= x <= "o"), ""):
        raise ValueError(f"RLE text with {odd!r}")
    packed = {"size": [height, width], "counts": counts.encode()}
    found = coco_mask.decode(packed)
    # It fills up what is missing without a word: what was read must give the same text.
    if coco_mask.encode(np.asfortranarray(found))["counts"] != packed["counts"]:
        raise ValueError(f"RLE text that is not one of {height}x{width} pixels, as COCO writes it")
    return found.astype(bool)


def fill(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """bool[height, width]: the union of polygons as COCO fills them (x, y, x, y, ... each).

    Raises:
      ValueError: fewer than three points, or numbers that cannot be drawn.
    """
    for polygon in polygons:
        if len(_numbers(polygon, "polygon")) % 2 or len(polygon) < 6:
            raise ValueError(f"a polygon of {len(polygon)} numbers")
    if not len(polygons):
        return np.zeros((height, width), bool)
    lists = [[float(x) for x in polygon] for polygon in polygons]
    packed = coco_mask.frPyObjects(lists, height, width)
    return coco_mask.decode(coco_mask.merge(packed)).astype(bool)
