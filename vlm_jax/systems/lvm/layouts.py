"""How images become visual sentences: every layout of the paper. Numpy only.

A layout returns the images of one sentence in order; tokenizing them is somebody else's job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import images, records


def video_clip(
    frames_u8: np.ndarray, rng: np.random.Generator, *, num_images: int = 16, stride: int = 8
) -> list[np.ndarray]:
    """Frames at a constant stride, from a uniform start; a short clip lowers the stride.

    Raises:
      BadRecordError: fewer frames than images. (The reference takes another clip.)
    """
    count = len(frames_u8)
    if count < num_images:
        raise records.BadRecordError(f"{count} frames cannot give {num_images} images")
    stride = min(stride, max(1, (count - 1) // max(1, num_images - 1)))
    start = int(rng.integers(count - stride * (num_images - 1)))
    return [frames_u8[start + stride * i] for i in range(num_images)]


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
    by_class: Mapping[Any, Sequence[np.ndarray]],
    rng: np.random.Generator,
    *,
    num_images: int = 16,
    per_class: int = 4,
) -> list[np.ndarray]:
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


def pairs(sources_u8: Sequence[np.ndarray], targets_u8: Sequence[np.ndarray]) -> list[np.ndarray]:
    """x1 y1 x2 y2 ...: one task shown by examples."""
    if len(sources_u8) != len(targets_u8):
        raise ValueError(f"{len(sources_u8)} sources for {len(targets_u8)} targets")
    return [image for pair in zip(sources_u8, targets_u8) for image in pair]


def colorization(images_u8: Sequence[np.ndarray]) -> list[np.ndarray]:
    """grey1 colour1 grey2 colour2 ..."""
    return pairs([images.grey_u8(image) for image in images_u8], images_u8)


def inpainting(images_u8: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """masked1 image1 ...: a black square (3 in 10), or black patches of an 8 x 8 grid."""
    masked = []
    for image in images_u8:
        height, width = image.shape[:2]
        holes = np.zeros((height, width), bool)
        if rng.random() < 0.3:  # probabilities and sizes of this function: spec 4.1
            side = int(rng.integers(int(0.1 * height), int(0.5 * height)))
            y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
            holes[y : y + side, x : x + side] = True
        else:
            dropped = rng.random((8, 8)) >= rng.random()
            holes = dropped[np.arange(height)[:, None] * 8 // height, np.arange(width) * 8 // width]
        masked.append(np.where(holes[..., None], 0, image).astype(np.uint8))
    return pairs(masked, images_u8)
