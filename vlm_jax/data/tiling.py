"""The output pictures of the reference's batch files: frames side by side, candidates below."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from vlm_jax.data import images, records

_MAX_NAME = 251  # bytes; file systems take 255, and a suffix may be added


def tile(
    candidates_u8: Sequence[Sequence[np.ndarray]], inputs_u8: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """One row per candidate, its frames from left to right, the inputs before them if given.

    Args:
      candidates_u8: [candidate][frame] uint8[H, W, 3], all of one size.
      inputs_u8: of the same size, repeated in every row.

    Returns:
      uint8[candidates * H, frames * W, 3].
    """
    rows = [np.concatenate([*inputs_u8, *frames], axis=1) for frames in candidates_u8]
    return np.concatenate(rows, axis=0)


def output_size(spec: str, original: tuple[int, int]) -> tuple[int, int] | None:
    """(height, width) of every image of the output; None keeps what was made.

    Args:
      spec: "" (keep), "original" (the size of the last input) or "W,H".
      original: height and width of the last input.

    Raises:
      DataError: another spec, or one of too many pixels.
    """
    if not spec:
        return None
    if spec == "original":
        return int(original[0]), int(original[1])
    found = re.fullmatch(r"\s*([1-9]\d{0,4})\s*,\s*([1-9]\d{0,4})\s*", spec)
    if not found:
        raise records.DataError(f"resize_output={spec!r} is not '', 'original' or 'WIDTH,HEIGHT'")
    if int(found[1]) * int(found[2]) > images.MAX_PIXELS:
        raise records.DataError(
            f"resize_output={spec!r}: pictures of more than {images.MAX_PIXELS} pixels"
        )
    return int(found[2]), int(found[1])


def draw(
    candidates_u8: Sequence[Sequence[np.ndarray]],
    inputs_u8: Sequence[np.ndarray] = (),
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """`tile` with every image stretched to `size` (height, width); None: that of the first one."""
    size = size or candidates_u8[0][0].shape[:2]

    def stretch(pictures):
        return [images.resize(picture, size) for picture in pictures]

    return tile([stretch(frames) for frames in candidates_u8], stretch(inputs_u8))


def place(folder: str | os.PathLike, output: str, *, anywhere: bool = False) -> pathlib.Path:
    """Where the picture called `output` goes: below `folder`, ".png" added to a bare name.

    Args:
      folder: of all outputs.
      output: what the batch file says.
      anywhere: also absolute paths and "..".

    Raises:
      DataError: no file's name, no picture's suffix, or a path that leaves the folder. Batch files
        come from elsewhere.
    """
    folder = pathlib.Path(folder)
    path = folder / output
    try:
        long = max((len(os.fsencode(part)) for part in path.parts), default=0) > _MAX_NAME
        if pathlib.PurePath(output).name in ("", "..") or "\0" in output or long:
            raise ValueError
    except ValueError as error:  # also letters that no file system has
        raise records.DataError(f"output {output!r:.80} names no file") from error
    path = path if path.suffix else path.with_name(path.name + ".png")
    if not anywhere and folder.resolve() not in path.resolve().parents:
        raise records.DataError(
            f"output {output!r} leaves {folder}; use relative paths without '..', or allow it "
            f"with --anywhere"
        )
    _format(path)
    return path


def save(path: pathlib.Path, picture_u8: np.ndarray) -> None:
    """Writes PNG or JPEG, by the name.

    Raises:
      DataError: another suffix.
    """
    format = _format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(images.encode(picture_u8, format))


def _format(path: pathlib.Path) -> str:
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".bmp": "bmp"}
    if path.suffix.lower() not in kinds:
        raise records.DataError(f"{path}: outputs end with {', '.join(kinds)}")
    return kinds[path.suffix.lower()]
