"""What often lies where a large file should be: a pointer, a web page, nothing."""

from __future__ import annotations

import os


def not_data(path: str | os.PathLike) -> str:
    """Why the file cannot be what its name says, as the end of a sentence; "" when it may be."""
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
