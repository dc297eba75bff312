"""What may lie where a large file should be: a pointer, a web page, a pipe, nothing."""

from __future__ import annotations

import os
import stat


def not_data(path: str | os.PathLike) -> str:
    """Why the file cannot be what its name says, as the end of a sentence; "" when it may be.

    Raises:
      OSError: missing, or not readable.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):  # opening a pipe would wait for somebody to write
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        return f"is {kind}, not a file"
    with open(path, "rb") as file:
        begin = file.read(512)
    if not begin:
        return "is empty (0 bytes): cut off; fetch it again"
    if begin.startswith(b"version https://git-lfs.github.com/"):
        return "is a git-lfs pointer, not the file: run `git lfs pull` where it was cloned"
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file: its download failed; fetch it again"
    return ""
