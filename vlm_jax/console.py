"""What programs print: whatever the console can show of it."""

from __future__ import annotations

import sys


def tolerate_any_text() -> None:
    """Prints what the console's encoding lacks as escapes.

    Names of files and labels are any Unicode, or not even that; a console (Windows, a legacy
    locale) that cannot show one must not end the program that has just computed it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a notebook or a test has put its own
            stream.reconfigure(errors="backslashreplace")
