"""Disks that are full, and what is said of them."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil


def is_full(error: BaseException) -> bool:
    """Whether this error, or the text that another program made of it, is a full disk or quota."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return getattr(error, "errno", None) in codes or any(os.strerror(c) in text for c in codes)


def explain(error: BaseException, target: str | os.PathLike) -> str:
    """The error in words; of a full disk which one it is, what is free there, and the remedy.

    Args:
      error: what writing raised.
      target: file or folder that was being written; need not exist.
    """
    if not is_full(error):
        return str(error)
    folder = pathlib.Path(os.path.expanduser(os.fspath(target))).absolute()
    while not folder.is_dir():
        folder = folder.parent
    try:
        free = f"{shutil.disk_usage(folder).free:,} bytes are free there"
    except OSError:
        free = "how much is free there cannot be read"
    return (
        f"the disk is full: cannot write {os.fspath(target)} ({free}). Make room, or name a place "
        "on another disk, and run the same command again"
    )
