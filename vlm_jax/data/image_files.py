"""Image files and PIL images as RGB arrays, with bounds that hold before anything is decoded."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import stat
import struct
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from vlm_jax.data import records

# Refused from the header, before anything is decoded: 64 Mpx are 192 MiB as RGB.
MAX_PIXELS = 64 * 2**20
MAX_BYTES = 256 * 2**20
# No EPS, PDF or WMF: they hand the file to an interpreter.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "ICO", "AVIF")
_WIDE = ("PNG", "PPM")  # earlier versions of Pillow give their 16 bits as 32
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# Decoders that hold several copies of a picture: their share of the pixels.
_COSTLY = {"WEBP": 2, "AVIF": 2, "JPEG2000": 2}
_MAX_ICON = 1024  # pixels along a side
_STRIP = 2**20  # pixels converted at a time
_ORIENTATION = 0x0112  # EXIF
_PHOTOMETRIC, _YCBCR = 0x0106, 6  # TIFF


class ImageError(records.BadRecordError):
    """An image that cannot be used; names the file and the cause."""


def decode(
    source: bytes | str | os.PathLike, *, name: str = "", max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """One image as RGB, upright (EXIF orientation applied), first frame of animations.

    Alpha is dropped, not composited, as the reference does; 16-bit grey keeps its high byte.

    Args:
      source: encoded bytes, or a path.
      name: what messages call it; the path by default.
      max_pixels: larger images are refused from their header.

    Returns:
      image_u8, uint8[H, W, 3].

    Raises:
      ImageError: missing, not an image, truncated, too large, or of an unsupported format.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), name or f"<{len(source)} bytes>", max_pixels)
    name = name or os.fsdecode(source)
    return _decode(read_bytes(source, name), name, max_pixels)


def read_bytes(path: str | os.PathLike, name: str) -> bytes:
    """The content of a regular file of bounded size; never waits for a pipe.

    Raises:
      ImageError: missing, unreadable, a folder or device, or too large.
    """
    try:
        check_regular(path, name)
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size  # read(n) takes n bytes of memory at first
            content = stream.read(min(size, MAX_BYTES) + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise _unreadable(error, name) from error
    if len(content) > MAX_BYTES:
        raise ImageError(f"{name}: more than the limit of {MAX_BYTES} bytes")
    return content


def check_regular(path: str | os.PathLike, name: str) -> None:
    """Raises ImageError unless the path is a regular file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise _unreadable(error, name) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise ImageError(f"{name}: is {kind}, not a file")


def _unreadable(error: Exception, name: str) -> ImageError:
    if isinstance(error, ImageError):
        return error
    return ImageError(f"{name}: cannot read: {getattr(error, 'strerror', None) or error}")


def to_rgb(image: Image.Image, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A PIL image of any mode, turned as EXIF says, without alpha; uint8[H, W, 3].

    Raises:
      ImageError: empty, too large, truncated, or of numbers without a range.
    """
    _check_size(image, name, max_pixels)
    with _as_image_error(name):
        _as_pillow_13(image)
        image.load()
        turn = image.getexif().get(_ORIENTATION, 1)
        if image.mode == "F":
            low, high = _extrema(image)
            check_range(low, high, name)
        if image.mode == "I" and image.format not in _WIDE and 0 < _extrema(image)[1] < 256:
            raise ImageError(
                f"{name}: of 32 bits, with values up to {_extrema(image)[1]}: a dark picture "
                'of 16 bits, or one of 8? Say it: convert("L") for 8, an array of uint16 for 16'
            )
        width, height = image.size
        upright = np.empty((width, height, 3) if turn in (5, 6, 7, 8) else (height, width, 3), "u1")
        # Strip by strip into the result, seen as it is stored: whole copies for mode, orientation
        # and NumPy would take gigabytes at the limit of pixels.
        stored, rows = _as_stored(upright, turn), max(1, _STRIP // width)
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            stored[top:bottom] = _rgb(image.crop((0, top, width, bottom)), name)
    return upright


def to_bytes(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 of an array of uint8, uint16 (the high byte), bool or floats in [0, 1] (rounded).

    Raises:
      ImageError: another dtype, or floats outside [0, 1]; shows their range.
    """
    kind = array.dtype.kind + str(array.dtype.itemsize)
    if kind == "u1":
        return array
    if kind == "u2":
        return (array >> 8).astype(np.uint8)
    if kind == "b1":
        return array.astype(np.uint8) * np.uint8(255)
    if kind[0] != "f":
        raise ImageError(
            f"{name}: {array.dtype} has no defined range; give uint8, uint16, bool or "
            f"floats in 0..1"
        )
    check_range(array.min(), array.max(), name)
    return np.rint(array.astype(np.float32) * np.float32(255)).astype(np.uint8)


def _extrema(image: Image.Image) -> tuple[float, float]:
    """Of a picture of one channel."""
    found: Any = image.getextrema()
    return found


def check_range(low: float, high: float, name: str) -> None:
    """Raises ImageError unless 0 <= low and high <= 1."""
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ImageError(
            f"{name}: values from {low:g} to {high:g}; a picture is uint8, or float in 0..1; "
            f"scale the values"
        )


def _decode(content: bytes, name: str, max_pixels: int) -> np.ndarray:
    formats = _formats()
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        formats = (*formats, _heif(name))
    if content[:4] == b"\0\0\1\0":
        _check_icon(content, name)
    with _as_image_error(name):
        image = Image.open(io.BytesIO(content), formats=formats)
    with image:
        return to_rgb(image, name, max_pixels)


def _check_icon(content: bytes, name: str) -> None:
    """Pillow decodes an icon while it opens it; the PNG inside may be larger than it says."""
    for header in re.finditer(rb"\x89PNG\r\n\x1a\n....IHDR(.{8})", content, re.DOTALL):
        width, height = struct.unpack(">II", header[1])
        if max(width, height) > _MAX_ICON:
            raise ImageError(
                f"{name}: an icon of {width}x{height} pixels; {_MAX_ICON} are the most"
            )


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _heif(name: str) -> str:
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError(
            f"{name}: HEIC pictures need another package: pip install pillow-heif"
        ) from error
    pillow_heif.register_heif_opener()
    return "HEIF"


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if not width * height:
        raise ImageError(f"{name}: an empty picture, {width}x{height}")
    most = max_pixels // _COSTLY.get(image.format or "", 1)
    if width * height > most:
        kind = f" for {image.format}" if most < max_pixels else ""
        raise ImageError(
            f"{name}: {width}x{height} = {width * height} pixels is over the limit of {most}{kind}"
        )


def _as_pillow_13(image: Any) -> None:
    """Lets earlier versions read plain TIFF files of YCbCr, which they take for RGB in 4 bytes."""
    tiles = [tuple(tile) for tile in getattr(image, "tile", ())]
    raw = tiles and all(codec == "raw" and args[0] == "RGBX" for codec, _, _, args in tiles)
    if raw and image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _YCBCR:
        image._mode = "YCbCr"
        image.tile = [(*tile[:3], ("YCbCr", *tile[3][1:])) for tile in tiles]


def _as_stored(upright: np.ndarray, turn: int) -> np.ndarray:
    """The view of an upright array in which a file of this EXIF orientation lists its rows."""
    view = upright.swapaxes(0, 1) if turn in (5, 6, 7, 8) else upright
    view = view[::-1] if turn in (3, 4, 6, 7) else view
    return view[:, ::-1] if turn in (2, 3, 7, 8) else view


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    """uint8[H, W, 3], or [H, W, 1] of grey."""
    if image.mode == "F":
        return to_bytes(np.asarray(image), name)[..., None]
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 instead of scaling.
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"integers from {wide.min()} to {wide.max()} are not in 0..65535")
        return (wide >> 8).astype(np.uint8)[..., None]
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB") or image
    if image.mode in ("La", "RGBa"):  # Pillow undoes premultiplied alpha in a step of its own
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode == "P" and "transparency" in image.info:  # else it warns
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _as_image_error(name: str):
    # Decoders of hostile bytes raise nearly every type there is: OSError, SyntaxError,
    # struct.error, zlib.error, DecompressionBombError, ...
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        cause = "not an image of a supported format"
        if not isinstance(error, Image.UnidentifiedImageError):
            cause = str(error) or type(error).__name__
        raise ImageError(f"{name}: {cause}") from error
