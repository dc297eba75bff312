"""Images on the host: decoded safely, resized like the reference, drawn as labelled grids.

Arrays are H, W, C. `image_u8` is 0...255, `image01` is float32 0...1. Everything that can be wrong
with a file becomes an `ImageError` that names it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vlm_jax.data import records

# Refused from the header, before anything is decoded: 64 Mpx decode to 192 MiB.
MAX_PIXELS = 64 * 2**20
MAX_BYTES = 256 * 2**20
# No EPS, PDF or WMF: they hand the file to an interpreter.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "ICO", "AVIF")


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
        name = name or f"<{len(source)} bytes>"
        return _decode(bytes(source), name, max_pixels)
    path = pathlib.Path(source)
    name = name or str(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(f"{name}: {size} bytes is over the limit of {MAX_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{name}: cannot read: {error.strerror}") from error
    return _decode(content, name, max_pixels)


def _decode(content: bytes, name: str, max_pixels: int) -> np.ndarray:
    with _as_image_error(name):
        image = Image.open(io.BytesIO(content), formats=_formats())
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} = {width * height} pixels is over the limit of {max_pixels}"
        )
    with _as_image_error(name):
        image.load()
        return np.array(_rgb(ImageOps.exif_transpose(image)))


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 instead of scaling.
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


@contextlib.contextmanager
def _as_image_error(name: str):
    # Decoders of hostile bytes raise nearly every type there is: OSError, SyntaxError,
    # struct.error, zlib.error, DecompressionBombError, ...
    try:
        yield
    except Exception as error:
        cause = "not an image of a supported format"
        if not isinstance(error, Image.UnidentifiedImageError):
            cause = str(error) or type(error).__name__
        raise ImageError(f"{name}: {cause}") from error


def encode(image_u8: np.ndarray, format: str = "png", **options) -> bytes:
    """The image as file content, by default lossless."""
    stream = io.BytesIO()
    Image.fromarray(image_u8).save(stream, format=format, **options)
    return stream.getvalue()


def resize(image_u8: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Stretches to `size` (a side, or height and width), ignoring the aspect ratio.

    Pillow's antialiased bicubic itself: it rounds to 8 bits between its two passes, and a float
    resize differs in enough pixels to change tokens.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image_u8.shape[:2] == (height, width):
        return image_u8
    image = Image.fromarray(image_u8)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def to01(image_u8: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1], the input range of the VQGAN."""
    return (image_u8 / 255.0).astype(np.float32)


def to_u8(image01: np.ndarray, *, truncate: bool = False) -> np.ndarray:
    """[0, 1] -> uint8, clipped. The reference truncates where we round."""
    scaled = np.clip(np.asarray(image01, np.float32), 0, 1) * np.float32(255)
    return (scaled if truncate else np.rint(scaled)).astype(np.uint8)


def grey(image01: np.ndarray) -> np.ndarray:
    """Grey with the reference's weights, in three equal channels."""
    value = image01 @ np.array([0.2989, 0.5870, 0.1140], np.float32)  # upstream: its script
    return np.repeat(value[..., None], 3, axis=-1).astype(np.float32)


def grey_u8(image_u8: np.ndarray) -> np.ndarray:
    """`grey` on bytes, rounded."""
    return to_u8(grey(to01(image_u8)))


def crop_square(image_u8: np.ndarray) -> np.ndarray:
    """The central square."""
    height, width = image_u8.shape[:2]
    side = min(height, width)
    y, x = (height - side) // 2, (width - side) // 2
    return image_u8[y : y + side, x : x + side]


def pad_square(image_u8: np.ndarray, value: int = 0) -> np.ndarray:
    """The image in the middle of the smallest square that holds it."""
    height, width = image_u8.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), value, np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = image_u8
    return square


def random_crop(
    image_u8: np.ndarray, rng: np.random.Generator, *, min_side: int, flip: bool = True
) -> np.ndarray:
    """A random square of side min_side ... the short side, mirrored half of the time."""
    height, width = image_u8.shape[:2]
    short = min(height, width)
    side = int(rng.integers(min(min_side, short), short + 1))
    y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    crop = image_u8[y : y + side, x : x + side]
    return crop[:, ::-1] if flip and rng.random() < 0.5 else crop


def draw_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    cell: int = 128,
    gap: int = 4,
    font_size: int = 13,
) -> np.ndarray:
    """A labelled contact sheet, white background.

    Args:
      rows: image_u8 arrays of any size (enlarged with hard pixels, reduced smoothly); None leaves
        the cell empty. Rows may differ in length.
      column_labels, row_labels: text above the columns and left of the rows; may be shorter.
      cell: side of a cell in pixels. gap: space between cells. font_size: in pixels.

    Returns:
      uint8[H, W, 3].
    """
    font = ImageFont.load_default(font_size)
    left = gap + max((int(font.getlength(text)) + gap for text in row_labels), default=0)
    lines = max((len(_wrap(text, font, cell)) for text in column_labels), default=0)
    top = gap + lines * (font_size + 3)
    columns = max(len(row) for row in rows)
    step = cell + gap
    sheet = Image.new("RGB", (left + columns * step, top + len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(column_labels):
        for line, part in enumerate(_wrap(text, font, cell)):
            pen.text((left + column * step, 2 + line * (font_size + 3)), part, "black", font)
    for y, row in enumerate(rows):
        if y < len(row_labels):
            middle = top + y * step + (cell - font_size) // 2
            pen.text((gap, middle), row_labels[y], "black", font)
        for x, image_u8 in enumerate(row):
            if image_u8 is not None:
                sheet.paste(_thumbnail(image_u8, cell), (left + x * step, top + y * step))
    return np.array(sheet)


def _thumbnail(image_u8: np.ndarray, cell: int) -> Image.Image:
    image = Image.fromarray(image_u8)
    scale = cell / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    enlarge = scale > 1
    return image.resize(size, Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
