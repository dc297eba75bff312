"""Ends this process at once, from any thread: with a message, a status and what must be undone.

`sys.exit` unwinds the main thread, which may sit in a compilation or wait for a process that is no
more. What is left behind is what SIGKILL leaves: every file of a run is written so that it may.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

# Exit statuses of the program, besides 0 and the 1 of an error in the code.
USER_ERROR = 2  # something to mend: a recipe, a file, a full disk
PEER_FAILED = 3  # another process of the job failed; its error is repeated here
SIGNAL = 128  # plus the signal's number: stopped before there was anything to save

_last_words: list[Callable[[int, str], None]] = []
_ending = threading.Lock()


def before(callback: Callable[[int, str], None]) -> Callable[[], None]:
    """Has `end` call `callback(status, message)` first; returns what takes it back."""
    _last_words.append(callback)
    return lambda: _last_words.remove(callback) if callback in _last_words else None


def end(status: int, message: str = "") -> None:
    """Prints `message` on stderr, calls what `before` was given, and exits without unwinding."""
    _ending.acquire()  # never released: only one thread gets here
    if message:
        print(message, file=sys.stderr)
    for callback in reversed(_last_words):
        try:
            callback(status, message)
        except Exception as error:  # the process ends in any case, and with this status
            print(f"while ending: {error}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # closed, or nobody reads it any more
    os._exit(status)
