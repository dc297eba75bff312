"""Sample counts of MP4 and QuickTime files, checked before a demuxer makes room for them."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

_FOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
_COUNT_AT = {b"trun": 4, b"stsz": 8, b"stz2": 8}  # where the number of samples stands in a box
_MAX_BOXES = 2**20


def check_counts(stream: BinaryIO) -> None:
    """Refuses tables of more samples than the file has bytes; leaves the stream at its start.

    A fragment can promise samples of a default size without listing them: a demuxer allocates
    gigabytes for a file of a kilobyte. Other containers, and broken boxes, are left to it.

    Raises:
      ValueError: see above.
    """
    total = stream.seek(0, os.SEEK_END)
    pending, seen, samples = [(0, total)], 0, 0
    while pending:
        place, end = pending.pop()
        while place + 8 <= end:
            stream.seek(place)
            head = stream.read(24)
            size, kind = struct.unpack_from(">I4s", head)
            start = 8
            if size == 1 and len(head) >= 16:
                (size,), start = struct.unpack_from(">Q", head, 8), 16
            size = end - place if size == 0 else size
            if size < start or place == 0 and kind not in (b"ftyp", b"moov", b"moof", b"styp"):
                break  # not such a file, or damaged
            if kind in _FOLDERS:
                pending.append((place + start, min(end, place + size)))
            at = start + _COUNT_AT.get(kind, 0)
            if kind in _COUNT_AT and at + 4 <= len(head):
                samples += struct.unpack_from(">I", head, at)[0]
            seen, place = seen + 1, place + size
            if samples > total or seen > _MAX_BOXES:
                raise ValueError(
                    f"{samples} samples in {seen} boxes of a file of {total} bytes cannot be"
                )
    stream.seek(0)
