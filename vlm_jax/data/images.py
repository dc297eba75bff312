"""Images on the host: one gate for every kind of picture, resizing, labelled grids.

    as_image("cat.jpg"), as_image(url), as_image(pil_image), as_image(tensor)   -> uint8[H, W, 3]

Arrays are H, W, C. `image_u8` is 0...255, `image01` is float32 0...1. Everything that can be wrong
with a picture becomes an `ImageError` that names it. Files are decoded by `image_files`.
"""

from __future__ import annotations

import io
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_jax.data import image_files, records, web

ImageError = image_files.ImageError
MAX_PIXELS, MAX_BYTES = image_files.MAX_PIXELS, image_files.MAX_BYTES
decode = image_files.decode

_MAX_NAME = 8192  # characters of a path or URL
GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # of red, green, blue; upstream: its colorization script
ENCODED = ("jpg", "jpeg", "png", "webp", "image")  # keys of records: tar shards, TFDS
_KINDS = (
    "a path, a file:// or http(s):// URL, the bytes of a file or the open file, a PIL image, or an "
    "array [H, W] or [H, W, 1|3|4] of uint8, uint16, bool or floats in 0..1"
)


def as_image(value: Any, *, name: str = "", reach: str = "web") -> np.ndarray:
    """One picture of any kind as RGB; equal pixels give equal arrays whatever the wrapping.

    Files and PIL images are turned as EXIF says; of an animation the first frame counts. Grey gets
    three channels, alpha is dropped, 16 bits keep the high byte, floats are rounded to bytes.

    Args:
      value: a path (str or PathLike), a file:// or http(s):// URL, the bytes of a file, a binary
        file that is open (read from where it is), a PIL image of any mode, or an array of NumPy,
        JAX or torch: [H, W] or [H, W, 1|3|4] of uint8, uint16, bool or floats in [0, 1].
      name: what messages call a picture that has no path.
      reach: where names may lead: "web", "files" (paths and file:// only: for names that come with
        the data) or "nothing" (for servers). VLM_JAX_FETCH=0 also switches the web off.

    Returns:
      image_u8, uint8[H, W, 3].

    Raises:
      ImageError: anything else; an array [C, H, W], floats outside [0, 1], an empty picture; or a
        file or URL that cannot be read, see `image_files.decode` and `web.read`.
    """
    if isinstance(value, str | os.PathLike):
        return _named(os.fsdecode(value), reach)
    if isinstance(value, bytes | bytearray | memoryview):
        content: Any = value  # not copied
        return decode(content, name=name)
    if isinstance(value, Image.Image):
        return image_files.to_rgb(value, name or f"PIL image ({value.mode})")
    name = name or "picture"
    if hasattr(value, "read"):
        return decode(_content(value, name), name=name)
    array = host_array(value)
    if array is None:
        raise ImageError(f"{name}: a {type(value).__name__} is no picture; give {_KINDS}")
    return _from_array(array, name)


def as_images(values: Iterable[Any], *, reach: str = "web") -> list[np.ndarray]:
    """`as_image` of each; messages number them from 0."""
    return [as_image(x, name=f"picture {i}", reach=reach) for i, x in enumerate(values)]


def of_record(record: Mapping[str, Any]) -> np.ndarray:
    """The picture of a record, uint8[H, W, 3]: `image_u8`, or a file's bytes under `ENCODED`.

    Raises:
      BadRecordError: none of these keys, it is no such picture, or cannot be read.
    """
    key = next((key for key in ("image_u8", *ENCODED) if key in record), None)
    if key is None:
        raise records.BadRecordError(
            f"a record with the keys {', '.join(records.keys_of(record))} has no picture; one of "
            f"image_u8, {', '.join(ENCODED)} is needed"
        )
    value = record[key]
    if key == "image_u8":
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise records.BadRecordError(f"image_u8: {error}") from error
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
            raise records.BadRecordError(
                f"image_u8 is {value.dtype}{list(value.shape)}, not uint8[H, W, 3]"
            )
        if value.size:
            return np.ascontiguousarray(value)
    return as_image(value, name=str(record.get("id", "")), reach="files")


def one_or_many(values: Any) -> tuple[list[Any], bool]:
    """The pictures of an argument that is one picture or several, and whether it is one.

    Args:
      values: a picture of any kind, an array [N, H, W, C], or an iterable of pictures.

    Raises:
      ImageError: neither.
    """
    kinds = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | io.IOBase
    array = None if isinstance(values, kinds) else host_array(values)
    if isinstance(values, kinds) or (array is not None and array.ndim in (2, 3)):
        return [values], True
    if array is not None and array.ndim > 3:
        return list(array), False
    numbers = array is not None and array.dtype.kind not in "OU"
    if numbers or isinstance(values, Mapping) or not isinstance(values, Iterable):
        raise ImageError(f"a {type(values).__name__} holds no pictures; give {_KINDS}, or a list")
    return list(values), False


def _content(file: Any, name: str) -> bytes:
    try:
        content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: closed
        raise ImageError(f"{name}: cannot read: {error}") from error
    if not isinstance(content, bytes) or len(content) > MAX_BYTES:
        raise ImageError(f"{name}: an open file must be binary and have at most {MAX_BYTES} bytes")
    return content


def _named(text: str, reach: str) -> np.ndarray:
    scheme = re.match(r"data:|[a-z][a-z0-9+.-]+://", text, re.IGNORECASE)
    if scheme and scheme[0].lower() not in ("file://", "http://", "https://"):
        raise ImageError(f"{text:.80}: {scheme[0]} is not read; give a file, or its bytes")
    if len(text) > _MAX_NAME:
        raise ImageError(f"{text:.80}...: {len(text)} characters are no name of a file")
    if reach == "nothing":
        raise ImageError(f"{text}: paths and URLs are not taken here; give the content")
    if not web.is_url(text):
        return decode(_local(text), name=text)
    if reach != "web":
        raise ImageError(f"{text}: URLs are not read here; save the file first")
    return decode(web.read(text, max_bytes=MAX_BYTES), name=text)


def _local(text: str) -> str:
    if not text.lower().startswith("file://"):
        return os.path.expanduser(text)
    parts = urllib.parse.urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise ImageError(f"{text}: names the host {parts.netloc!r}; file:///PATH is read")
    # Through bytes: names need not be UTF-8.
    return os.fsdecode(urllib.parse.unquote_to_bytes(os.fsencode(parts.path)))


def host_array(value: Any) -> np.ndarray | None:
    """A NumPy, JAX or torch array as NumPy's, bfloat16 as float32; None for anything else.

    Raises:
      ImageError: an array without plain values: sparse, deleted, being traced, with masked ones.
    """
    if not hasattr(value, "__array__"):
        return None
    if np.ma.is_masked(value):
        raise ImageError("an array with masked values; fill them first: array.filled(0)")
    try:
        if hasattr(value, "detach"):  # torch, perhaps on a device, perhaps bfloat16
            value = value.detach().cpu().resolve_conj().resolve_neg()
            value = value.float() if value.is_floating_point() else value
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        cause = str(error).partition("\n")[0]
        raise ImageError(f"a {type(value).__name__} gives no plain values: {cause}") from error
    # bfloat16 and the like are no floats to NumPy.
    return array.astype(np.float32) if "float" in array.dtype.name else array


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    shape = list(array.shape)
    if array.ndim in (2, 3) and not array.size:
        raise ImageError(f"{name}: an empty picture, shape {shape}")
    if array.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        raise ImageError(
            f"{name}: shape {shape} is [C, H, W]; give [H, W, C]: transpose(1, 2, 0) in NumPy, "
            f"permute(1, 2, 0) in torch"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"{name}: shape {shape} is none of [H, W], [H, W, 1], [H, W, 3], [H, W, 4]"
        )
    image_u8 = image_files.to_bytes(array, name)
    image_u8 = image_u8[..., None] if array.ndim == 2 else image_u8[..., :3]
    return np.ascontiguousarray(np.broadcast_to(image_u8, (*image_u8.shape[:2], 3)))


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
    value = image01 @ np.array(GREY_WEIGHTS, np.float32)
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


_CAPTION_WIDTH = 160  # pixels, after which the text left of a row goes on in the next line


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
      column_labels, row_labels: text above the columns and left of the rows, in several lines where
        it is long; may be shorter.
      cell: side of a cell in pixels. gap: space between cells. font_size: in pixels.

    Returns:
      uint8[H, W, 3].
    """
    font = ImageFont.load_default(font_size)
    captions = [_wrap(text, font, _CAPTION_WIDTH) for text in row_labels]
    widths = [int(font.getlength(line)) + gap for caption in captions for line in caption]
    left = gap + max(widths, default=0)
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
        caption = captions[y] if y < len(captions) else []
        above = top + y * step + (cell - font_size - (len(caption) - 1) * (font_size + 3)) // 2
        for line, part in enumerate(caption):
            pen.text((gap, above + line * (font_size + 3)), part, "black", font)
        for x, image_u8 in enumerate(row):
            if image_u8 is not None:
                sheet.paste(_thumbnail(image_u8, cell), (left + x * step, top + y * step))
    return np.array(sheet)


def _thumbnail(image_u8: np.ndarray, cell: int) -> Image.Image:
    image = Image.fromarray(image_u8)
    scale = cell / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    enlarge = scale > 1
    return image.resize(
        (width, height), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    )


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
