"""What a console cannot show costs no result."""

import io
import pathlib
import re
import sys

import vlm_jax
from vlm_jax import console

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


def test_every_program_prints_so():
    programs = [
        path
        for path in ROOT.rglob("*.py")
        if re.search(r"__name__ == .__main__.", path.read_text())
        and "def main(" in path.read_text()
    ]
    assert len(programs) >= 6
    for path in programs:
        assert "console.tolerate_any_text()" in path.read_text(), path
