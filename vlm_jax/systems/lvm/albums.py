"""Photos and videos of the CPU-sized recipes, and the visual sentences drawn from them.

    kind     sentence                                        held out, of the shipped data
    video    frames of one shot, stride 1 to 4               a shot, and the end of another
    pan      a window moving slowly over a photo             other photos
    colour   grey, colour, grey, colour, ...                 photos that training never shows
    group    images of one class, then of the next           the same photos
    inpaint  photo with black holes, photo, ...              the same photos
    mask     scene, mask of the thing in it, ...             other things, other halves of textures

An album of somebody's own folder has no masks; what is held out is chosen by content, see
`datasets/own_files`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import images as images_lib
from vlm_jax.data import records, video
from vlm_jax.datasets import (
    demo_photos,
    demo_scenes,
    demo_videos,
    few_shot,
    own_files,
    own_pictures,
)
from vlm_jax.systems.lvm import layouts

KINDS = ("video", "pan", "colour", "group", "inpaint", "mask")
_MAX_STRIDE = 4  # frames; upstream draws 1...4 for frame folders
_MAX_PAN = 0.03  # of the window per frame: like the videos, most of a frame is in the next one
_PAN_SIDE = 4  # a photo to pan over has this many times the pixels of an image on a side
_MIN_SIDE = 8  # pixels; a window over less is nothing
_MAX_FRAMES = 600  # of one video
_MAX_BYTES = 2**31  # of all photos to pan over, and of all frames


@dataclasses.dataclass(frozen=True)
class Album:
    """What sentences are drawn from; lists may be empty.

    Attributes:
      photos: {"image_u8", "label" (-1: none)}, square and small.
      views: groups of larger photos to pan over; every group is as likely.
      shots: {"frames_u8"} of one scene each.
      scenes: {"image_u8", "masks"} by number, or None.
    """

    photos: Sequence[records.Record]
    views: Sequence[Sequence[records.Record]]
    shots: Sequence[records.Record]
    scenes: Any = None

    def why_not(self, kind: str, num_images: int) -> str:
        """Why there can be no sentences of this kind; "" when there can."""
        pairs, found = num_images // 2, len(self.photos)
        if kind == "video" and not self.shots:
            return f"no video has {num_images} frames"
        if kind == "pan" and not any(self.views):
            return "there are no photos"
        if kind in ("colour", "inpaint") and found < pairs:
            return f"{found} photos, and a sentence shows {pairs}"
        if kind == "group" and not self._per_class(num_images):
            return f"too few classes and photos for {num_images} images of some classes"
        return "" if kind != "mask" or self.scenes else "there are no masks"

    def draw(self, kind: str, num_images: int, rng: np.random.Generator) -> list[np.ndarray]:
        """The images of one random sentence; not of masks, see `masks`."""
        if kind == "video":
            length = np.array([len(shot["frames_u8"]) for shot in self.shots], np.float64)
            shot = self.shots[int(rng.choice(len(self.shots), p=length / length.sum()))]
            stride = int(rng.integers(1, _MAX_STRIDE + 1))
            return layouts.video_clip(shot["frames_u8"], rng, num_images=num_images, stride=stride)
        if kind == "pan":
            views = self.views[0] if len(self.views) == 1 or rng.random() < 0.5 else self.views[1]
            photo = views[int(rng.integers(len(views)))]
            return layouts.pan(photo["image_u8"], rng, num_images=num_images, max_step=_MAX_PAN)
        if kind == "group":
            per_class = self._per_class(num_images)
            by_class = self._by_class()
            return layouts.category_groups(
                by_class, rng, num_images=num_images, per_class=per_class
            )
        chosen = rng.choice(len(self.photos), num_images // 2, replace=False)
        shown = [self.photos[i]["image_u8"] for i in chosen]
        return layouts.colorization(shown) if kind == "colour" else layouts.inpainting(shown, rng)

    def masks(self, count: int, num_images: int) -> Iterator[list[np.ndarray]]:
        """`count` sentences scene1 mask1 scene2 mask2 ...; masks are white on black."""
        size = num_images // 2
        for first in range(0, count * size, size):
            drawn = [self.scenes[index] for index in range(first, first + size)]
            yield layouts.pairs(
                [scene["image_u8"] for scene in drawn],
                [few_shot.paint(scene["masks"].any(axis=0)) for scene in drawn],
            )

    def _by_class(self) -> dict[int, list[np.ndarray]]:
        by_class: dict[int, list[np.ndarray]] = {}
        for photo in self.photos:
            if photo["label"] >= 0:
                by_class.setdefault(photo["label"], []).append(photo["image_u8"])
        return by_class

    def _per_class(self, num_images: int) -> int:
        """Images of a class in a row, 2 where that is possible; 0 when nothing is."""
        sizes = [len(photos) for photos in self._by_class().values()]
        for size in range(2, num_images // 2 + 1):  # few classes have many held-out photos
            if num_images % size == 0 and sum(n >= size for n in sizes) >= num_images // size:
                return size
        return 0


def demo(split: str, side: int, count: int, crops: int, seed: int) -> Album:
    """The album of real photos and videos that come in wheels.

    Args:
      split: "train" or "heldout".
      side: pixels of an image.
      count: of scenes with masks.
      crops: random crops of the large photos, besides the small ones, to train on. They stay out
        of the held-out split: its large photos are few.
      seed: of crops and scenes.

    Raises:
      DataError: the photos or videos cannot be had (offline, or changed).
    """
    source = demo_photos.Photos(split, crops if split == "train" else 0, side, seed)
    return Album(
        photos=[source[i] for i in range(len(source))],
        # As many windows over large photos, which are few, as over small ones.
        views=[demo_photos.load_large(split), demo_photos.load_tiny(split)],
        shots=demo_videos.load_shots(split, side),
        scenes=demo_scenes.Scenes(split, count=count, size=side, seed=seed),
    )


def own(
    listing: own_files.Listing, held: np.ndarray, split: str, side: int, length: int, most: int
) -> Album:
    """The album of somebody's own folder; files that cannot be read are named and left out.

    Args:
      listing, held: of `own_files`.
      split: "train" or "heldout".
      side: pixels of an image.
      length: frames that a video needs.
      most: photos, and a twentieth of it videos, that are read; evenly over the folder.
    """
    files = [file for file, out in zip(listing.files, held) if out == (split == "heldout")]
    stills = _some([file for file in files if not file.is_video], most, "photos")
    clips = _some([file for file in files if file.is_video], max(1, most // 20), "videos")
    photos, views = _photos(listing.root, stills, side)
    return Album(photos, [views] if views else [], _shots(listing.root, clips, side, length))


def _photos(root, files, side: int) -> tuple[list[records.Record], list[records.Record]]:
    """Small squares, and larger photos to pan over."""
    photos, views = [], []
    labels = {name: i for i, name in enumerate(sorted({f.group for f in files if f.group}))}
    # Four thirds: photos are longer than high.
    view_side = min(_PAN_SIDE * side, int((_MAX_BYTES / max(1, 4 * len(files))) ** 0.5))
    for file in files:
        try:
            image_u8 = images_lib.decode(root / file.name)
        except records.BadRecordError as error:
            own_files.say(f"left out: {error}")
            continue
        if min(image_u8.shape[:2]) < _MIN_SIDE:
            own_files.say(f"left out: {file.name}: only {image_u8.shape[1]}x{image_u8.shape[0]}")
            continue
        view_u8 = own_pictures.shrink(image_u8, max(side, view_side))
        small_u8 = own_pictures.shrink(images_lib.crop_square(view_u8), side)
        photos.append({"image_u8": small_u8, "label": labels.get(file.group, -1)})
        views.append({"image_u8": view_u8})
    return photos, views


def _shots(root, files, side: int, length: int) -> list[records.Record]:
    """The first frames of every video that has enough."""
    shots = []
    count = max(length, min(_MAX_FRAMES, _MAX_BYTES // max(1, 3 * side**2 * len(files))))
    for file in files:
        try:
            frames_u8 = video.read_frames(
                root / file.name, count=count, size=side, crop=True, antialias=True
            )
        except records.BadRecordError as error:
            own_files.say(f"left out: {error}")
            continue
        if len(frames_u8) >= length:
            shots.append({"frames_u8": frames_u8})
        else:
            own_files.say(f"left out: {file.name}: {len(frames_u8)} frames, {length} are needed")
    return shots


def _some(files: Sequence[own_files.File], most: int, what: str) -> list[own_files.File]:
    if len(files) <= most:
        return list(files)
    print(f"[lvm] {most} of {len(files)} {what} are read (prepare.most)", file=sys.stderr)
    return [files[int(i)] for i in np.linspace(0, len(files) - 1, most)]
