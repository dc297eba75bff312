"""What programs print: whatever the console can show of it, and nothing once it is gone."""

from __future__ import annotations

import sys
from typing import Any, TextIO


def tolerate_any_text() -> None:
    """Prints what the console's encoding lacks as escapes, and goes on without a console.

    Names of files and labels are any Unicode, or not even that; a console (Windows, a legacy
    locale) that cannot show one must not end the program that has just computed it. Nor must one
    that is closed (`| head`, a terminal that is gone) end a run of days.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        own = isinstance(stream, _Lasting)
        if not own and hasattr(stream, "reconfigure"):  # a notebook or a test may put its own
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Lasting(stream, always=name == "stderr"))


class _Lasting:
    """A text stream that drops what is written to it once nobody reads it any more.

    Args:
      stream: the stream.
      always: drop it after any other error too (a full disk behind `2> log`).
    """

    def __init__(self, stream: TextIO, always: bool):
        self._stream = stream
        self._dropped = OSError if always else BrokenPipeError

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except self._dropped:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except self._dropped:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
