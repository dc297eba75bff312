"""Video frames on the host, through PyAV (`pip install "vlm_jax[data]"`).

Frame n of a file is the n-th that decoding it from its start gives, turned as the file's display
matrix says. Containers are opened by content, whatever their name: only those of `FORMATS`, and
nothing that they refer to.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.data import image_files, images, mp4_boxes, records

# FFmpeg also reads playlists and descriptions of network streams, and would follow them.
FORMATS = (
    "mov", "matroska", "webm", "avi", "mpeg", "mpegvideo", "mpegts", "asf", "flv", "ogg", "gif",
    "h264", "hevc", "m4v", "ivf", "mxf", "nut", "dv", "yuv4mpegpipe",
)  # fmt: skip
MAX_FRAME_PIXELS = 2**25  # 8K
MAX_OUTPUT = 2**30  # bytes of the frames of one call

Size = int | tuple[int, int] | None


def read_frames(
    source: bytes | str | os.PathLike,
    *,
    start: int = 0,
    stride: int = 1,
    count: int | None = None,
    size: Size = None,
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
    fit = images.resize if antialias else resize
    with _opened(source, name) as (container, name):
        frames, track = _Frames(name), container.streams.video[0]
        known = len(range(start, track.frames, stride))  # 0 where the container does not say
        frames.expect(known if count is None else min(count, known), _shape(track, size, crop))
        for index, frame in enumerate(container.decode(video=0)):
            if count is not None and len(frames.made) >= count:
                break
            if index >= start and (index - start) % stride == 0:
                frame_u8 = _upright(frame)
                frame_u8 = images.crop_square(frame_u8) if crop else frame_u8
                frames.add(index, fit(frame_u8, size) if size else frame_u8)
    if not frames.made:
        raise images.ImageError(f"{name}: no frame at or after {start}")
    return frames.stack(list(frames.made))


def count_frames(path: str | os.PathLike) -> int:
    """Frames of the file; from its packets where these tell, else by decoding all.

    Raises:
      ImageError: missing, not a video, or damaged.
    """
    with _opened(path) as (container, _):
        stamps = _stamps(container)
    return _count_decoded(path) if stamps is None else len(stamps)


def read_at(path: str | os.PathLike, frames: Sequence[int], *, size: Size = None) -> np.ndarray:
    """The frames of these numbers; decoding starts at a key frame before the first if it can.

    Args:
      path: of the file.
      frames: increasing, from 0, in presentation order.
      size: stretch to this, see `resize`.

    Returns:
      frames_u8, uint8[N, H, W, 3].

    Raises:
      ImageError: missing, not a video, damaged, too large, or ends before a frame.
    """
    with _opened(path) as (container, name):
        stamps = _stamps(container)
        if stamps is not None and frames[-1] >= len(stamps):
            raise images.ImageError(f"{name}: has {len(stamps)} frames, none at {frames[-1]}")
        _Frames(name).expect(len(frames), _shape(container.streams.video[0], size))
        for numbered in _seeks(container, stamps, frames[0]) if stamps else ():
            made = _pick(numbered, frames, size, name)
            if len(made.made) == len(frames):
                return made.stack(frames)
    with _opened(path) as (container, name):
        made = _pick(enumerate(container.decode(video=0)), frames, size, name)
    missing = [number for number in frames if number not in made.made]
    if missing:
        total = _count_decoded(path)
        raise images.ImageError(f"{name}: has {total} frames, none at {missing[0]}")
    return made.stack(frames)


class _Frames:
    """Frames by number: of one size, and bounded in all."""

    def __init__(self, name: str):
        self.made: dict[int, np.ndarray] = {}
        self._name = name

    def add(self, number: int, frame_u8: np.ndarray) -> None:
        """Keeps one."""
        first = next(iter(self.made.values()), frame_u8)
        if frame_u8.shape != first.shape:
            (height, width), (was_high, was_wide) = frame_u8.shape[:2], first.shape[:2]
            raise images.ImageError(
                f"{self._name}: frame {number} is {width}x{height}, those before "
                f"{was_wide}x{was_high}; give size="
            )
        self.expect(len(self.made) + 1, first.shape)
        self.made[number] = frame_u8

    def expect(self, count: int, shape: Sequence[int]) -> None:
        """Raises ImageError if so many frames, uint8[H, W, 3] each, are too many for one call."""
        if count * math.prod(shape) > MAX_OUTPUT:
            raise images.ImageError(
                f"{self._name}: {count} frames of {shape[1]}x{shape[0]} are over the limit of "
                f"{MAX_OUTPUT} bytes; read fewer at a time, or smaller ones"
            )

    def stack(self, numbers: Sequence[int]) -> np.ndarray:
        """uint8[N, H, W, 3]; empties this, so that nothing is held twice."""
        result = np.empty((len(numbers), *self.made[numbers[0]].shape), np.uint8)
        for place, number in enumerate(numbers):
            result[place] = self.made.pop(number)
        return result


def _shape(track: Any, size: Size, crop: bool = False) -> tuple[int, int, int]:
    """Of the frames of a call; height and width may be exchanged."""
    height, width = track.codec_context.height, track.codec_context.width
    if crop:
        height = width = min(height, width)
    if size:
        height, width = (size, size) if isinstance(size, int) else size
    return height, width, 3


@contextlib.contextmanager
def _opened(source: bytes | str | os.PathLike, name: str = "") -> Iterator[tuple[Any, str]]:
    """A container with a video of decent size, and its name; decoding errors have the name."""
    av = records.require("av")
    content = source if isinstance(source, bytes | bytearray | memoryview) else None
    if content is not None:
        name = name or f"<{len(content)} bytes>"
    else:
        name = name or os.fsdecode(source)
        image_files.check_regular(os.fsdecode(source), name)
    only_known = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    try:
        # By descriptor: from a name FFmpeg would take protocols ("12:30.mp4") and guess formats.
        stream: BinaryIO = (
            io.BytesIO(content) if content is not None else open(os.open(source, os.O_RDONLY), "rb")
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(stream)
            mp4_boxes.check_counts(stream)
            container = stack.enter_context(
                av.open(stream, container_options=only_known, metadata_errors="replace")
            )
            if not container.streams.video:
                raise images.ImageError(f"{name}: holds no video")
            if container.streams.video[0].codec_context is None:
                raise images.ImageError(f"{name}: holds video of an unknown codec")
            _bound(container.streams.video[0].codec_context, name)
            yield container, name
    except images.ImageError:
        raise
    except (av.error.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        cause = getattr(error, "strerror", None) or error
        if isinstance(error, av.error.ArgumentError):  # the white list's
            cause = f"none of the containers {', '.join(FORMATS)}"
        raise images.ImageError(f"{name}: cannot decode: {cause}") from error


def _bound(codec: Any, name: str) -> None:
    """Refuses large frames, now and when the size changes on the way."""
    if codec.width * codec.height > MAX_FRAME_PIXELS:
        raise images.ImageError(
            f"{name}: frames of {codec.width}x{codec.height} are over the limit of "
            f"{MAX_FRAME_PIXELS} pixels"
        )
    codec.options = {**codec.options, "max_pixels": str(MAX_FRAME_PIXELS)}


def _stamps(container: Any) -> list[int] | None:
    """Presentation times of all frames, in order; None where they cannot be trusted.

    AVI and raw streams have none, or count packets in the order of decoding.
    """
    codec = container.streams.video[0].codec_context
    packets = [
        (packet.pts, packet.dts)
        for packet in container.demux(video=0)
        if packet.size and not packet.is_discard and not _hidden(codec.name, packet)
    ]
    stamps = {pts for pts, _ in packets}
    reordered = codec.has_b_frames and all(pts == dts for pts, dts in packets)
    if None in stamps or len(stamps) < len(packets) or reordered:
        return None
    return sorted(stamps)


def _hidden(codec: str, packet: Any) -> bool:
    """Whether a packet only serves others: VP8's frames say so in a bit."""
    return codec == "vp8" and not bytes(packet)[0] & 16


def _seeks(container: Any, stamps: list[int], first: int) -> Iterator[Iterator[tuple[int, Any]]]:
    """Numbered frames from key frames ever further before the first one that is wanted.

    Seeks may land late, or between key frames where the container has no index.
    """
    place = {stamp: number for number, stamp in enumerate(stamps)}
    back = 0
    while first - back > 0:
        container.seek(stamps[first - back], stream=container.streams.video[0])
        yield _numbered(container, place, first)
        back = 4 * back + 8


def _numbered(container: Any, place: dict[int, int], first: int) -> Iterator[tuple[int, Any]]:
    """Frames with their numbers, as long as the stamps say that none is missing."""
    expected = -1
    for frame in container.decode(video=0):
        number = place.get(frame.pts, -1)
        late = number > first or not frame.key_frame
        if number < 0 or (late if expected < 0 else number != expected):
            return
        expected = number + 1
        yield number, frame


def _pick(
    numbered: Iterator[tuple[int, Any]], wanted: Sequence[int], size: Size, name: str
) -> _Frames:
    """The wanted ones of numbered frames, as far as they go."""
    frames, missing = _Frames(name), set(wanted)
    for number, frame in numbered:
        if number in missing:
            frame_u8 = _upright(frame)
            frames.add(number, resize(frame_u8, size) if size else frame_u8)
            missing.remove(number)
        if not missing:
            break
    return frames


def _count_decoded(path: str | os.PathLike) -> int:
    with _opened(path) as (container, _):
        return sum(1 for _ in container.decode(video=0))


def _upright(frame: Any) -> np.ndarray:
    """The frame as it is to be shown: the nearest quarter turn or mirror of its display matrix."""
    frame_u8 = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return frame_u8
    xx, xy, _, yx, yy = struct.unpack_from("=5i", bytes(matrix))
    if abs(xx) + abs(yy) >= abs(xy) + abs(yx):
        right, down = xx, yy
    else:  # what was right is down
        frame_u8, right, down = frame_u8.swapaxes(0, 1), yx, xy
    frame_u8 = frame_u8[:, ::-1] if right < 0 else frame_u8
    return np.ascontiguousarray(frame_u8[::-1] if down < 0 else frame_u8)


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
