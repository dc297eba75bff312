"""Real photographs with labels, for the CPU-sized recipes of label prediction.

    photos  what                                         labels
    tiny    500 photos of 64x64 (demo_photos)            one: the name of the class
    large   28 photos of 300...1400 px (demo_annotations)  up to seven, by hand

Held out are the same photos as there. The classes of the tiny photos are uneven: 91 show a military
uniform, 37 classes occur once; hence `cap` and `min_images`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from typing import Any

from vlm_jax.data import records
from vlm_jax.datasets import demo_annotations, demo_photos

_SPLITS = ("train", "heldout", "all")
_PHOTOS = ("tiny", "large", "both")
_TEXTS = ("labels", "captions")


@dataclasses.dataclass(frozen=True)
class LabelledPhotos:
    """Random-access source of {"image_u8", "labels" or "captions", "id", "name", "split"}.

    Attributes:
      split: "train", "heldout" or "all".
      photos: "tiny", "large" or "both".
      cap: at most so many tiny photos of a class in this split, chosen by a hash of the name; 0
        takes all.
      min_images: leaves out classes with fewer tiny photos, both splits counted.
      text: "labels", or "captions" of the large photos, whose nouns the formatter extracts.
    """

    split: str = "train"
    photos: str = "tiny"
    cap: int = 20
    min_images: int = 0
    text: str = "labels"

    skipped = ()

    def __post_init__(self):
        if self.split not in _SPLITS:
            raise records.DataError(f"split={self.split!r} is none of {', '.join(_SPLITS)}")
        if self.photos not in _PHOTOS:
            raise records.DataError(f"photos={self.photos!r} is none of {', '.join(_PHOTOS)}")
        if self.text not in _TEXTS:
            raise records.DataError(f"text={self.text!r} is none of {', '.join(_TEXTS)}")
        if self.text == "captions" and self.photos != "large":
            raise records.DataError("only the large photos have captions; set photos='large'")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> records.Record:
        return dict(self._records[index])

    def record_id(self, index: int) -> str:
        """Name of the photo."""
        return self._records[index]["id"]

    def fingerprint(self) -> Any:
        """The choice; the photos themselves are fixed by hashes."""
        return ["labelled_photos", dataclasses.asdict(self)]

    @functools.cached_property
    def _records(self) -> list[records.Record]:
        tiny = self._tiny() if self.photos != "large" else []
        return tiny + (self._large() if self.photos != "tiny" else [])

    def __getstate__(self) -> dict[str, Any]:
        return {key: x for key, x in self.__dict__.items() if key != "_records"}

    def _tiny(self) -> list[records.Record]:
        total = collections.Counter(photo["name"] for photo in demo_photos.load_tiny("all"))
        photos = [
            photo
            for photo in demo_photos.load_tiny(self.split)
            if total[photo["name"]] >= self.min_images
        ]
        if self.cap:
            by_class = collections.defaultdict(list)
            for photo in sorted(photos, key=lambda p: hashlib.sha256(p["id"].encode()).digest()):
                by_class[photo["name"]].append(photo["id"])
            kept = {name for names in by_class.values() for name in names[: self.cap]}
            photos = [photo for photo in photos if photo["id"] in kept]
        keys = "image_u8", "id", "name", "split"
        return [
            {**{key: photo[key] for key in keys}, "labels": [photo["name"].lower()]}
            for photo in photos
        ]

    def _large(self) -> list[records.Record]:
        keys = "image_u8", "id", "split", self.text
        return [
            {**{key: photo[key] for key in keys}, "name": photo["id"]}
            for photo in demo_annotations.load(self.split)
        ]


def make_source(**fields) -> LabelledPhotos:
    """For `type="labelled_photos"` in a config.

    Raises:
      DataError: unknown split, photos or text.
    """
    return LabelledPhotos(**fields)
