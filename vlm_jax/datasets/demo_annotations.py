"""Boxes, masks, captions and word points of 28 photographs that ship inside published packages.

Drawn and checked by hand for this project (assets/demo_annotations.json); the photographs are read
at run time and are not part of this package. Error of a box: 1 to 3 pixels. Masks are "good" or
"approx"; score on the good ones only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.data import annotations as annotations_lib
from vlm_jax.data import drawing, images, records, wheels


def load(split: str = "all") -> list[records.Record]:
    """Photos of one split ("train", "heldout", "all"; seven are held out).

    Returns:
      Records of image_u8 uint8[H, W, 3], id, split, captions, labels (of the whole photo),
      exhaustive_labels (every instance is boxed), narrative {text, words: [(word, [x, y] or
      None)]}, and objects: each label, box_xyxy_px (end exclusive), referring_expression and,
      where it has a mask, polygons_px and mask_quality; see `mask`.

    Raises:
      DataError: unknown split, or the photos cannot be had.
    """
    if split not in ("train", "heldout", "all"):
        raise records.DataError(f"split {split!r} is not 'train', 'heldout' or 'all'")
    return [photo for photo in _all() if split in (photo["split"], "all")]


def mask(photo: Mapping[str, Any], thing: Mapping[str, Any]) -> np.ndarray:
    """bool[H, W] of one object: the union of its polygons, outlines included.

    Raises:
      KeyError: the object has no mask.
    """
    return drawing.mask(
        annotations_lib.Thing(polygons=thing["polygons_px"]), *photo["image_u8"].shape[:2]
    )


@functools.cache
def _all() -> tuple[records.Record, ...]:
    file = importlib.resources.files("vlm_jax") / "assets" / "demo_annotations.json"
    photos = []
    for photo in json.loads(file.read_text(encoding="utf-8"))["photos"]:
        if photo["distribution"] not in wheels.PACKAGES:
            continue  # two photos of scikit-learn, whose archive is large
        content = wheels.read(photo["distribution"], photo["member"])
        if hashlib.sha256(content).hexdigest() != photo["sha256"]:
            raise records.DataError(f"{photo['member']} is not the photo that was annotated")
        photos.append({**photo, "image_u8": images.decode(content, name=photo["member"])})
    return tuple(photos)
