"""Pascal-5i: the 20 classes of VOC 2012 in four folds, for few-shot masks and boxes.

The folder is VOC2012 as it is unpacked (VOCtrainval_11-May-2012.tar: VOCdevkit/VOC2012), with

    JPEGImages/*.jpg
    SegmentationClass/*.png          or SegmentationClassAug/*.png, which is preferred
    ImageSets/Segmentation/val.txt
    Annotations/*.xml                for kind="box"

Fold i holds the classes 5i+1 ... 5i+5. A record is one image with one class of the fold, so an
image with two classes is two records. kind="mask": the pixels of the class; void pixels (255) are
background. kind="box": images with one annotated object only, its box filled, and no object over
half of the image (Bar et al., Visual Prompting via Image Inpainting, 2022, section 4).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.data import images, records

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
_MAX_SHARE = 0.5  # of the image that the object of kind="box" may cover
_ARCHIVE = "VOCtrainval_11-May-2012.tar"


class _Item(NamedTuple):
    name: str
    label: int
    box: tuple[int, int, int, int] | None = None  # first and last pixel: x0, y0, x1, y1


@dataclasses.dataclass(frozen=True)
class Pascal5i:
    """Random-access source of {"image_u8", "mask" bool[H, W], "label", "fold", "id"}.

    Args:
      path: folder of VOC 2012.
      fold: 0 ... 3; -1 takes all four.
      kind: "mask" or "box".
      split: name of the list in ImageSets/Segmentation.

    Attributes:
      labels: int[len], the class (1 ... 20) of every record.

    Raises:
      DataError: something is missing; names it, and what to download.
    """

    path: str
    fold: int = -1
    kind: str = "mask"
    split: str = "val"

    def __post_init__(self):
        if self.fold not in (-1, 0, 1, 2, 3):
            raise records.DataError(f"fold={self.fold} is not 0, 1, 2, 3, or -1 for all")
        if self.kind not in ("mask", "box"):
            raise records.DataError(f"kind={self.kind!r} is not 'mask' or 'box'")
        self._items  # noqa: B018 - missing files show before anything expensive

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> records.Record:
        item = self._items[index]
        root = _folder(self.path)
        image = images.decode(root / "JPEGImages" / f"{item.name}.jpg")
        if item.box:
            x0, y0, x1, y1 = item.box
            mask = np.zeros(image.shape[:2], bool)
            mask[y0 : y1 + 1, x0 : x1 + 1] = True
        else:
            mask = _read_classes(root, item.name) == item.label
        return {
            "image_u8": image,
            "mask": mask,
            "label": item.label,
            "fold": (item.label - 1) // 5,
            "name": CLASSES[item.label - 1],
            "id": self.record_id(index),
        }

    def record_id(self, index: int) -> str:
        """Image and class."""
        item = self._items[index]
        return f"{item.name}/{CLASSES[item.label - 1]}"

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """See the class."""
        return np.array([item.label for item in self._items], np.int64)

    @functools.cached_property
    def _items(self) -> list[_Item]:
        items = _list_items(str(_folder(self.path)), self.split, self.kind)
        kept = [item for item in items if self.fold in (-1, (item.label - 1) // 5)]
        if not kept:
            raise records.DataError(f"{self.path}: fold {self.fold} of {self.split!r} is empty")
        return kept


def make_source(**fields) -> Pascal5i:
    """For `type="pascal5i"` in a config."""
    return Pascal5i(**fields)


@functools.lru_cache(maxsize=8)
def _list_items(path: str, split: str, kind: str) -> tuple[_Item, ...]:
    """All records of the four folds. Reads every mask once: some ten seconds for VOC."""
    root = pathlib.Path(path)
    text = _need(root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text(errors="replace")
    _need(root / "JPEGImages")
    names = text.split()
    if strange := [name for name in names if os.path.basename(name) != name or name in (".", "..")]:
        raise records.DataError(
            f"{split}.txt lists {strange[0]!r:.80}, which is no name of an image of the data set"
        )
    items = []
    if kind == "box":
        folder = _need(root / "Annotations")
        for name in names:
            items += _single_object(_need(folder / f"{name}.xml"), name)
    else:
        for name in names:
            present = np.unique(_read_classes(root, name))
            items += [_Item(name, int(label)) for label in present if 1 <= label <= 20]
    return tuple(items)


def _folder(path: str) -> pathlib.Path:
    root = pathlib.Path(os.path.expanduser(path)).absolute()
    for inner in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (inner / "JPEGImages").is_dir():
            return inner
    _need(root / "JPEGImages")
    return root


def _mask_folder(root: pathlib.Path) -> pathlib.Path:
    larger = root / "SegmentationClassAug"
    return larger if larger.is_dir() else _need(root / "SegmentationClass")


def _need(path: pathlib.Path) -> pathlib.Path:
    if not path.exists():
        raise records.DataError(
            f"{path} does not exist; Pascal-5i needs VOC 2012: unpack {_ARCHIVE} from the site of "
            f"the PASCAL VOC challenge and give its folder VOCdevkit/VOC2012"
        )
    return path


def _read_classes(root: pathlib.Path, name: str) -> np.ndarray:
    """uint8[H, W] of class numbers, not of the palette's colours."""
    path = _need(_mask_folder(root) / f"{name}.png")
    try:
        with Image.open(root / "JPEGImages" / f"{name}.jpg", formats=("JPEG",)) as photo:
            size = photo.size
        with Image.open(path, formats=("PNG",)) as image:
            if image.size != size:
                raise ValueError(f"is of {image.size} pixels, its photo of {size}")
            if image.mode not in ("P", "L"):
                raise ValueError(f"mode {image.mode}; a mask has one channel of class numbers")
            return np.array(image)
    except Exception as error:  # decoders of damaged files raise nearly every type there is
        raise records.DataError(f"{path}: {error}") from error


def _single_object(path: pathlib.Path, name: str) -> list[_Item]:
    """The object of an image with just one, unless it covers too much; else nothing."""
    text = path.read_text(errors="replace")
    objects = re.findall(r"<object>(.*?)</object>", text, re.DOTALL)
    if len(objects) != 1:
        return []
    # An object may have parts with boxes of their own, written after its own name and box.
    body = re.sub(r"<part>.*?</part>", "", objects[0], flags=re.DOTALL)

    def value(key, where):
        found = re.search(rf"<{key}>\s*(.*?)\s*</{key}>", where, re.DOTALL)
        if not found:
            raise records.DataError(f"{path}: no <{key}>; is it an annotation of VOC?")
        return found[1]

    label = value("name", body)
    if label not in CLASSES:
        raise records.DataError(f"{path}: {label!r} is not a class of VOC")
    try:
        width, height = (int(value(key, value("size", text))) for key in ("width", "height"))
        corners = [float(value(key, body)) for key in ("xmin", "ymin", "xmax", "ymax")]
        x0, y0, x1, y1 = (round(x) - 1 for x in corners)  # VOC counts pixels from 1
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width - 1), min(y1, height - 1)
        share = (x1 - x0 + 1) * (y1 - y0 + 1) / (width * height)
    except records.DataError:
        raise
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise records.DataError(f"{path}: not the numbers of a box: {error}") from error
    return [] if share > _MAX_SHARE else [_Item(name, CLASSES.index(label) + 1, (x0, y0, x1, y1))]
