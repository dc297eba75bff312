import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import records, sources


@pytest.fixture
def folder(tmp_path):
    for name, value in (("a", 10), ("b", 20), ("c", 30)):
        Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def make(folder, *lines, **fields):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return sources.make_source(type="visual_prompts", path=str(path), **fields)


def test_records(folder):
    source = make(
        folder,
        {"input": ["a.png", "b.png"], "target": ["c.png"]},
        "",
        {"input": [str(folder / "c.png")], "output": "made/c.png"},
    )
    assert len(source) == 2
    assert [int(x[0, 0, 0]) for x in source[0]["prompt"]] == [10, 20]
    assert source[0]["prompt"][0].shape == (4, 6, 3)
    assert [int(x[0, 0, 0]) for x in source[0]["target"]] == [30]
    assert source[1]["target"] == [] and source[1]["output"] == "made/c.png"
    assert source.record_id(0).endswith("prompts.jsonl:1")
    assert source.record_id(1) == "made/c.png"
    assert (source.longest("input"), source.longest("target")) == (2, 1)


def test_bad_lines(folder):
    with pytest.raises(records.DataError, match="prompts.jsonl:2: not JSON"):
        make(folder, {"input": ["a.png"]}, "{")
    with pytest.raises(records.DataError, match="'input' is empty"):
        make(folder, {"input": []})
    with pytest.raises(records.DataError, match="'target' is a list of paths, got 'c.png'"):
        make(folder, {"input": ["a.png"], "target": "c.png"})
    with pytest.raises(records.DataError, match="a line is"):
        make(folder, {"tokens": "AAAA"})
    with pytest.raises(records.DataError, match="'output' must be a path"):
        make(folder, {"input": ["a.png"]}, output=True)
    with pytest.raises(records.DataError, match="lines 1 and 2 both write 'x.png'"):
        make(folder, *[{"input": ["a.png"], "output": "x.png"}] * 2)
    with pytest.raises(records.DataError, match="cannot read"):
        sources.make_source(type="visual_prompts", path=str(folder / "none.jsonl"))


def test_missing_pictures_are_named_before_anything_runs(folder):
    with pytest.raises(records.DataError, match="2 of 3 pictures do not exist") as caught:
        make(folder, {"input": ["a.png", "gone.png"], "target": ["lost.png"]})
    assert "line 1: gone.png" in str(caught.value) and "line 1: lost.png" in str(caught.value)
