"""What a console cannot show costs no result."""

import errno
import io
import pathlib
import sys

import pytest

import vlm_jax
from vlm_jax.machines import console

ROOT = pathlib.Path(vlm_jax.__file__).parent


def test_any_text_is_printed(monkeypatch):
    for encoding in ("ascii", "cp1252", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        console.tolerate_any_text()
        print("東京 ☕ \udcff")
        stream.flush()
        shown = stream.buffer.getvalue().decode(encoding)
        assert shown.endswith(r"\udcff" + "\n")
        assert shown.startswith("東京 ☕" if encoding == "utf-8" else r"\u6771\u4eac \u2615")
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # cannot be set: any text goes anyway
    console.tolerate_any_text()


class Gone(io.RawIOBase):
    """A pipe that nobody reads, or a disk that is full."""

    def __init__(self, error):
        self.error = error

    def writable(self):
        return True

    def write(self, data):
        raise self.error


def test_a_console_that_is_gone_ends_nothing(monkeypatch):
    def stream(error):
        return io.TextIOWrapper(io.BufferedWriter(Gone(error)), write_through=True)

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(sys, "stdout", stream(BrokenPipeError()))
    monkeypatch.setattr(sys, "stderr", stream(full))
    console.tolerate_any_text()
    print("text", flush=True)
    print("text", file=sys.stderr, flush=True)
    monkeypatch.setattr(sys, "stdout", stream(full))  # results are missed there
    console.tolerate_any_text()
    with pytest.raises(OSError, match="No space left"):
        print("text", flush=True)


def test_every_program_prints_so():
    tools = [path for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()]
    assert len(tools) >= 5
    for path in (ROOT / "main.py", ROOT / "predict.py", *tools):
        assert "console.tolerate_any_text()" in path.read_text(), path
