"""Single frames of the videos in `demo_videos.py`, as pictures to train a tokenizer on."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from vlm_jax.data import records
from vlm_jax.datasets import demo_videos


@dataclasses.dataclass(frozen=True)
class Frames:
    """Random-access source of {"image_u8", "id", "name", "split"}.

    Args:
      split: "train", "heldout" or "all"; whole shots are held out, or the end of one.
      size: side in pixels.
      videos: names of the videos to take; () is all.
      stride: every so manieth frame of a shot; neighbours are nearly equal.
    """

    split: str = "train"
    size: int = 64
    videos: tuple[str, ...] = ()
    stride: int = 2

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> records.Record:
        shot, frame = self._index[index]
        record = _shots(self.split, self.size)[shot]
        return {
            "image_u8": np.array(record["frames_u8"][frame]),
            "id": self.record_id(index),
            "name": record["name"],
            "split": record["split"],
        }

    def record_id(self, index: int) -> str:
        """The shot and the frame in it."""
        shot, frame = self._index[index]
        return f"{_shots(self.split, self.size)[shot]['id']}#{frame}"

    @functools.cached_property
    def _index(self) -> list[tuple[int, int]]:
        shots = _shots(self.split, self.size)
        return [
            (number, frame)
            for number, shot in enumerate(shots)
            if not self.videos or shot["name"] in self.videos
            for frame in range(0, len(shot["frames_u8"]), self.stride)
        ]


def make_source(**fields) -> Frames:
    """For `type="demo_frames"` in a config."""
    fields["videos"] = tuple(fields.get("videos", ()))
    return Frames(**fields)


@functools.cache
def _shots(split: str, size: int) -> list[records.Record]:
    return demo_videos.load_shots(split, size)
