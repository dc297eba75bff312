"""What a console cannot show costs no result."""

import io
import pathlib
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
    tools = [path for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()]
    assert len(tools) >= 5
    for path in (ROOT / "main.py", ROOT / "predict.py", *tools):
        assert "console.tolerate_any_text()" in path.read_text(), path
