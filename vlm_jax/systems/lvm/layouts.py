"""How images become visual sentences: every layout of the paper, a function each. Numpy only.

A layout returns the images of one sentence in order; tokenizing them is somebody else's job. The
images may be anything: uint8 arrays, `pictures.Picture`s that are read later, numbers in a test.
Nothing is kept between calls: a sentence follows from the images and the generator alone.

    layout                        sentence
    video_clip, any_stride_clip   frame, frame, ...
    rotation                      view, next view, ... around one object
    pan                           a window moving over a photo (ours)
    category_groups               n images of a class, n of the next, ...
    pairs                         image, annotation, image, annotation, ...
    colorization, inpainting      altered, image, altered, image, ...
    modalities                    image and its annotations in one order, again for the next image
    annotated_clips               frames then annotations, or frame, annotation, frame, ...
    objects                       some frames of an object, their masks, then the next object
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from vlm_jax.data import order, pictures, records

T = TypeVar("T")


def group(number: int, count: int, size: int, seed: int) -> list[int]:
    """The members of the `number`-th group of `size` out of `count`, at random.

    Every epoch of count // size groups is a fresh permutation; what is left over is dropped.

    Raises:
      DataError: fewer members than one group needs.
    """
    if count < size:
        raise records.DataError(f"{count} images cannot fill a group of {size}")
    epoch, place = divmod(number, count // size)
    key = zlib.crc32(f"group/{seed}/{epoch}".encode())
    return order.permute(np.arange(place * size, (place + 1) * size), count, key).tolist()


def video_clip(
    frames: Sequence[T], rng: np.random.Generator, *, num_images: int = 16, stride: int = 8
) -> list[T]:
    """Frames at a constant stride, from a uniform start; a short clip lowers the stride.

    Raises:
      BadRecordError: fewer frames than images. (The reference takes another clip.)
    """
    count = len(frames)
    if count < num_images:
        raise records.BadRecordError(f"{count} frames cannot give {num_images} images")
    stride = min(stride, max(1, (count - 1) // max(1, num_images - 1)))
    start = int(rng.integers(count - stride * (num_images - 1)))
    return [frames[start + stride * i] for i in range(num_images)]


def any_stride_clip(
    frames: Sequence[T], rng: np.random.Generator, *, num_images: int = 16, max_stride: int = 4
) -> list[T]:
    """A clip whose stride is drawn from 1 ... max_stride, as for folders of frames."""
    stride = int(rng.integers(1, max_stride + 1))
    return video_clip(frames, rng, num_images=num_images, stride=stride)


def rotation(
    views: Sequence[T], rng: np.random.Generator, *, num_images: int = 16, step: int = 1
) -> list[T]:
    """Views of one object in the order of their azimuth, from any of them, around the circle.

    Raises:
      BadRecordError: the circle has fewer different views at this step.
    """
    if len(views) // np.gcd(step, len(views) or 1) < num_images:
        raise records.BadRecordError(f"{len(views)} views cannot give {num_images} at step {step}")
    start = int(rng.integers(len(views)))
    return [views[(start + step * i) % len(views)] for i in range(num_images)]


def pan(
    image_u8: np.ndarray, rng: np.random.Generator, *, num_images: int = 16, max_step: float = 0.1
) -> list[np.ndarray]:
    """A square window that moves over a photograph in a straight line at a constant speed.

    Args:
      image_u8: the photograph.
      rng: of window, place and direction.
      num_images: frames.
      max_step: largest move between frames, as a share of the window's side.
    """
    height, width = image_u8.shape[:2]
    side = int(min(height, width) * rng.uniform(0.4, 0.7))
    step_yx = rng.uniform(-max_step, max_step, 2) * side
    room_yx = np.array([height - side, width - side], np.float64)
    # No faster than the photograph has room for.
    step_yx = np.clip(step_yx, -room_yx / (num_images - 1), room_yx / (num_images - 1))
    low_yx = np.maximum(0, -step_yx * (num_images - 1))
    start_yx = low_yx + rng.random(2) * (room_yx - np.abs(step_yx) * (num_images - 1))
    corners = (start_yx + np.arange(num_images)[:, None] * step_yx).astype(int)
    return [image_u8[y : y + side, x : x + side] for y, x in corners]


def category_groups(
    by_class: Mapping[Any, Sequence[T]],
    rng: np.random.Generator,
    *,
    num_images: int = 16,
    per_class: int = 4,
) -> list[T]:
    """`per_class` different images of one class, then of the next, all drawn at random."""
    eligible = sorted((key for key in by_class if len(by_class[key]) >= per_class), key=str)
    wanted = num_images // per_class
    if len(eligible) < wanted:
        raise records.DataError(f"{len(eligible)} classes have {per_class} images, needs {wanted}")
    chosen = rng.choice(len(eligible), wanted, replace=False)
    sentence = []
    for members in (by_class[eligible[i]] for i in chosen):
        sentence += [members[i] for i in rng.choice(len(members), per_class, replace=False)]
    return sentence


def pairs(sources: Sequence[T], targets: Sequence[T]) -> list[T]:
    """x1 y1 x2 y2 ...: one task shown by examples."""
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources for {len(targets)} targets")
    return [image for pair in zip(sources, targets) for image in pair]


def colorization(photos: Sequence[T]) -> list[T]:
    """grey1 colour1 grey2 colour2 ..."""
    return pairs([pictures.edited(photo, "grey") for photo in photos], photos)


def inpainting(photos: Sequence[T], rng: np.random.Generator) -> list[T]:
    """hidden1 photo1 ...: a black square (3 in 10), or black patches; see `pictures.holes`."""
    seeds = rng.integers(2**63, size=len(photos)).tolist()
    return pairs([pictures.edited(p, "hide", seed) for p, seed in zip(photos, seeds)], photos)


def modalities(
    shots: Sequence[Sequence[T]], rng: np.random.Generator, *, elements: int = 0
) -> list[T]:
    """Each shot's modalities in one random order that all shots share.

    Args:
      shots: of each the image and its annotations, in the same order.
      rng: of the order.
      elements: how many of the modalities are drawn; 0 takes all.

    Raises:
      DataError: more elements than modalities.
    """
    count = len(shots[0])
    if elements > count:
        raise records.DataError(f"{elements} elements of an image with {count - 1} annotations")
    chosen = rng.permutation(count)[: elements or count]
    return [shot[i] for shot in shots for i in chosen]


def annotated_clips(clips: Sequence[Sequence[Sequence[T]]], *, interleaved: bool) -> list[T]:
    """Clips with annotations: f1 f2 ... a1 a2 ..., or f1 a1 f2 a2 ...; then the next clip.

    Args:
      clips: of each the frames, and the frames of every annotation.
      interleaved: the second form.
    """
    if interleaved:
        return [image for clip in clips for moment in zip(*clip, strict=True) for image in moment]
    return [image for clip in clips for track in clip for image in track]


def objects(
    tracks: Sequence[Sequence[Sequence[T]]], rng: np.random.Generator, *, per_object: int = 4
) -> list[T]:
    """CO3D: `per_object` frames of an object, their masks, then the next object.

    Args:
      tracks: of each object the frames and the masks, in the order of time.
      rng: which frames; they stay in order.

    Raises:
      BadRecordError: an object has fewer frames.
    """
    clips = []
    for frames, masks in tracks:
        if len(frames) < per_object:
            raise records.BadRecordError(f"{len(frames)} frames cannot give {per_object} images")
        chosen = np.sort(rng.choice(len(frames), per_object, replace=False))
        clips.append([[track[i] for i in chosen] for track in (frames, masks)])
    return annotated_clips(clips, interleaved=False)
