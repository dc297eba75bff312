"""Video frames on the host, through PyAV (`pip install "vlm_jax[data]"`)."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from vlm_jax.data import images, records

MAX_FRAMES = 20_000


def read_frames(
    source: bytes | str | os.PathLike,
    *,
    start: int = 0,
    stride: int = 1,
    count: int | None = None,
    size: int | tuple[int, int] | None = None,
    crop: bool = False,
    antialias: bool = False,
    name: str = "",
) -> np.ndarray:
    """Every `stride`-th frame from `start`, in presentation order.

    Args:
      source: encoded bytes, or a path.
      start, stride: in frames of the file.
      count: at most this many frames are returned; None reads to the end.
      size: stretch to this side (or height, width) while reading, see `resize`.
      crop: take the central square before resizing.
      antialias: resize as stills are (`images.resize`): for large reductions, where the
        reference's bilinear skips pixels and still edges flicker.
      name: what messages call the video; the path by default.

    Returns:
      frames_u8, uint8[N, H, W, 3].

    Raises:
      ImageError: missing, not a video, damaged, too large, or without any frame at `start`.
    """
    av = records.require("av")
    if isinstance(source, bytes | bytearray):
        stream, name = io.BytesIO(source), name or f"<{len(source)} bytes>"
    else:
        stream, name = str(pathlib.Path(source)), name or str(source)
    fit = images.resize if antialias else resize
    frames = []
    try:
        with av.open(stream) as container:
            if not container.streams.video:
                raise images.ImageError(f"{name}: holds no video")
            _check_size(container, name)
            for index, frame in enumerate(container.decode(video=0)):
                if index >= MAX_FRAMES or (count is not None and len(frames) >= count):
                    break
                if index < start or (index - start) % stride:
                    continue
                frame_u8 = frame.to_ndarray(format="rgb24")
                frame_u8 = images.crop_square(frame_u8) if crop else frame_u8
                frames.append(fit(frame_u8, size) if size else frame_u8)
    except (av.error.FFmpegError, OSError) as error:
        raise images.ImageError(f"{name}: cannot decode: {error}") from error
    if not frames:
        raise images.ImageError(f"{name}: no frame at or after {start}")
    return np.stack(frames)


def count_frames(path: str | os.PathLike) -> int:
    """Frames of the file, from its packets: nothing is decoded.

    Raises:
      ImageError: missing, not a video, or damaged.
    """
    with _opened(path) as container:
        return len(_stamps(container))


def read_at(
    path: str | os.PathLike, frames: Sequence[int], *, size: int | tuple[int, int] | None = None
) -> np.ndarray:
    """The frames of these numbers; decoding starts at the key frame before the first.

    Args:
      path: of the file.
      frames: increasing, from 0, in presentation order.
      size: stretch to this, see `resize`.

    Returns:
      frames_u8, uint8[N, H, W, 3].

    Raises:
      ImageError: missing, not a video, damaged, too large, or ends before a frame.
    """
    with _opened(path) as container:
        stamps = _stamps(container)
        if frames[-1] >= len(stamps):
            raise images.ImageError(f"{path}: has {len(stamps)} frames, none at {frames[-1]}")
        stamped = stamps[0] is not None
        place = {stamps[n] if stamped else n: i for i, n in enumerate(frames)}
        found: dict[int, np.ndarray] = {}
        if stamped:
            container.seek(stamps[frames[0]], stream=container.streams.video[0])
        for number, frame in enumerate(container.decode(video=0)):
            key = frame.pts if stamped else number
            if key in place:
                frame_u8 = frame.to_ndarray(format="rgb24")
                found[place[key]] = resize(frame_u8, size) if size else frame_u8
                if len(found) == len(frames):
                    break
    missing = [number for i, number in enumerate(frames) if i not in found]
    if missing:
        raise images.ImageError(f"{path}: cannot decode frame {missing[0]}")
    return np.stack([found[i] for i in range(len(frames))])


@contextlib.contextmanager
def _opened(path: str | os.PathLike):
    """The container of a file with a video of decent size; decoding errors name the file."""
    av = records.require("av")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise images.ImageError(f"{path}: holds no video")
            _check_size(container, str(path))
            yield container
    except (av.error.FFmpegError, OSError) as error:
        raise images.ImageError(f"{path}: cannot decode: {error}") from error


def _stamps(container) -> list[int | None]:
    """Presentation times of all frames, in order; all None where the file does not tell them."""
    packets = [p for p in container.demux(video=0) if p.size and not p.is_discard]
    stamps = {packet.pts for packet in packets}
    container.seek(0)
    if None in stamps or len(stamps) < len(packets):
        return [None] * len(packets)
    return sorted(stamps)


def _check_size(container, name: str) -> None:
    context = container.streams.video[0].codec_context
    if context.width * context.height > images.MAX_PIXELS:
        raise images.ImageError(
            f"{name}: frames of {context.width}x{context.height} are over the limit of "
            f"{images.MAX_PIXELS} pixels"
        )


def resize(frame_u8: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Bilinear without antialiasing, as the reference resizes video frames (but not stills).

    The fixed-point arithmetic of OpenCV's default resize: 11-bit weights, and exact halving
    averages 2x2 blocks.
    """
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = frame_u8.shape[:2]
    if (rows, columns) == (height, width):
        return frame_u8
    wide = frame_u8.astype(np.int32)
    if (rows, columns) == (2 * height, 2 * width):
        sums = wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2]
        return ((sums + 2) >> 2).astype(np.uint8)
    x0, x1, right = _taps(columns, width)
    y0, y1, below = _taps(rows, height)
    right, below = right[None, :, None], below[:, None, None]
    across = wide[:, x0] * (2048 - right) + wide[:, x1] * right >> 4
    mixed = (across[y0] * (2048 - below) >> 16) + (across[y1] * below >> 16)
    return ((mixed + 2) >> 2).astype(np.uint8)


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two source indices of each output pixel, and the 11-bit weight of the second."""
    scale = old / new
    centre = ((np.arange(new) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.int32)
    weight = np.rint((centre - first) * np.float32(2048)).astype(np.int32)
    return np.clip(first, 0, old - 1), np.clip(first + 1, 0, old - 1), weight
