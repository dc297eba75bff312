"""Video frames on the host, through PyAV (`pip install "vlm_jax[data]"`)."""

from __future__ import annotations

import io
import os
import pathlib

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
            context = container.streams.video[0].codec_context
            if context.width * context.height > images.MAX_PIXELS:
                raise images.ImageError(
                    f"{name}: frames of {context.width}x{context.height} are over the limit of "
                    f"{images.MAX_PIXELS} pixels"
                )
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


def resize(frame_u8: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Bilinear without antialiasing, as the reference resizes video frames (but not stills).

    The fixed-point arithmetic of OpenCV's default resize: 11-bit weights, and exact halving
    averages 2x2 blocks. (spec 2.6)
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
