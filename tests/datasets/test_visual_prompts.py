import json
import os

import numpy as np
import pytest
from PIL import Image

from tests import fuzz
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


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000, "5", "null", '{"input": null}', '{"input": [null]}', '{"input": {"a": 1}}',
        '{"input": [1e999]}', '{"input": ["a.png"], "output": 5}', '{"input": ["\\u0000"]}',
        '{"input": ["\\ud800.png"]}', '{"input": ["' + "n" * 500_000 + '"]}', '{"input": ["pipe"]}',
        '{"input": ["."]}',
    ],
    ids=lambda line: line[:30],
)  # fmt: skip
def test_hostile_lines(folder, line):
    os.mkfifo(folder / "pipe")
    with pytest.raises(records.DataError) as caught:
        make(folder, {"input": ["a.png"]}, line)
    assert len(str(caught.value)) < 1000


def test_a_pipe_is_no_list(folder):
    os.mkfifo(folder / "prompts")
    with pytest.raises(records.DataError, match="is not a regular file"):
        sources.make_source(type="visual_prompts", path=str(folder / "prompts"))


def test_separators_of_lines_that_json_does_not_know(folder):
    name = "a\u2028b.png"
    (folder / "a.png").rename(folder / name)
    text = json.dumps({"input": [name]}, ensure_ascii=False)
    assert make(folder, text)[0]["prompt"][0].shape == (4, 6, 3)


def test_damage_of_any_kind(folder):
    line = json.dumps({"input": ["a.png", "b.png"], "target": ["c.png"], "output": "d.png"})
    path = folder / "prompts.jsonl"
    for content in fuzz.mutations(f"{line}\n{line.replace('d.png', 'e.png')}\n".encode(), 300):
        path.write_bytes(content)
        with fuzz.bounded(megabytes=16):
            try:
                source = sources.make_source(type="visual_prompts", path=str(path))
            except records.DataError:
                continue
        assert all(isinstance(source.record_id(i), str) for i in range(len(source)))


@pytest.mark.parametrize("other", ["x.png", "x", "./x.png", "y/../x", "z//../x.png"])
def test_two_names_of_one_output(folder, other):
    lines = [{"input": ["a.png"], "output": name} for name in ("x.png", other)]
    with pytest.raises(records.DataError, match="lines 1 and 2 both write"):
        make(folder, *lines)


@pytest.mark.parametrize("names", [("d.png", "d.png/e.png"), ("a/d.png/b/e", "a/d.png")])
def test_an_output_that_would_be_a_folder_of_another(folder, names):
    with pytest.raises(records.DataError, match="writes the picture '.*d.png', of which line"):
        make(folder, *({"input": ["a.png"], "output": name} for name in names))


def test_a_file_without_lines(folder):
    with pytest.raises(records.DataError, match="holds no line"):
        make(folder)


@pytest.mark.parametrize("output", [".", "..", "a/..", "x.exe", "n" * 999])
def test_outputs_that_are_no_pictures(folder, output):
    with pytest.raises(records.DataError, match="prompts.jsonl:1: .*(names no file|end with)"):
        make(folder, {"input": ["a.png"], "output": output})
