"""Tables of captions and labels."""

import json

import pytest

from vlm_jax.data import records, tables


def table(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("name, text", [
    ("a.csv", "file,caption\na.jpg,\"a cat, on a sofa\"\nb.jpg,a dog\n"),
    ("a.csv", "\ufefffile;caption\r\na.jpg;a cat, on a sofa\r\nb.jpg;a dog\r\n"),
    ("a.tsv", "Image\tCaption\n./a.jpg\ta cat, on a sofa\n\nb.jpg\ta dog\n"),
    ("a.jsonl", '{"file_name": "a.jpg", "text": "a cat, on a sofa"}\n'
                '{"image": "b.jpg", "caption": ["a dog"]}\n'),
])  # fmt: skip
def test_captions(tmp_path, name, text):
    found = tables.read(table(tmp_path, name, text))
    assert [(entry.file, entry.captions) for entry in found.entries] == [
        ("a.jpg", ["a cat, on a sofa"]),
        ("b.jpg", ["a dog"]),
    ]
    assert not found.bad and not found.duplicates


def test_labels_are_lists_or_cut(tmp_path):
    lines = [
        {"image": "a.jpg", "labels": ["cat", "golden_retriever"]},
        {"image": "b.jpg", "label": "dog; sofa"},
    ]
    path = table(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    found = tables.read(path)
    labels = [entry.labels for entry in found.entries]
    assert labels == [["cat", "golden retriever"], ["dog", "sofa"]]


def test_lines_of_one_picture_are_put_together_and_repetitions_reported(tmp_path):
    path = table(tmp_path, "a.csv", "file,caption\na.jpg,one\na.jpg,two\na.jpg,one\n")
    found = tables.read(path)
    assert [entry.captions for entry in found.entries] == [["one", "two"]]
    assert found.duplicates == [(f"{path}:4", "a.jpg")]


def test_bad_lines_are_named(tmp_path):
    lines = [
        "{",
        "[1]",
        '{"image": 3, "caption": "x"}',
        '{"image": "a.jpg", "caption": ""}',
        '{"image": "b.jpg", "caption": 7}',
        '{"image": "c.jpg", "caption": "fine"}',
    ]
    path = table(tmp_path, "a.jsonl", "\n".join(lines))
    found = tables.read(path)
    assert [entry.file for entry in found.entries] == ["c.jpg"]
    assert [place for place, _ in found.bad] == [f"{path}:{n}" for n in range(1, 6)]
    causes = " | ".join(cause for _, cause in found.bad)
    for part in (
        "not JSON",
        "not a JSON object",
        "image is 3",
        "no text in caption",
        "caption is 7",
    ):
        assert part in causes


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "x", "must end in .csv"),
    ("a.csv", b"file,caption\na.jpg,\xff\xfe\n", "not UTF-8"),
    ("a.csv", "file,number\na.jpg,1\n", "columns there: file, number"),
    ("a.csv", "", "columns there: none"),
    ("a.csv", "file,caption,caption\na.jpg,x,y\n", "the column 'caption' comes twice"),
    ("a.csv", 'file,caption\na.jpg,"x\nb.jpg,y\n', "lines 2 to 3: unexpected end of data"),
    ("a.csv", "version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    ("a.jsonl", '{"file": "a", "file": "b", "caption": "c"}\n', "the key 'file' comes twice"),
    ("a.csv", "file,caption\na.jpg,a cat, red\n", "quote a text with commas"),
])  # fmt: skip
def test_what_cannot_be_read_is_said(tmp_path, name, content, message):
    with pytest.raises(records.DataError, match=message):
        tables.read(table(tmp_path, name, content))


def test_columns_can_be_named(tmp_path):
    path = table(tmp_path, "a.csv", "wo,was,label\na.jpg,eine Katze,x\n")
    (entry,) = tables.read(path, "wo", "was").entries
    assert (entry.file, entry.captions, entry.labels) == ("a.jpg", ["eine Katze"], [])


def test_one_table_of_a_folder(tmp_path):
    assert tables.find(tmp_path) is None
    table(tmp_path, "a.csv", "")
    assert tables.find(tmp_path).name == "a.csv"
    table(tmp_path, "b.jsonl", "")
    with pytest.raises(records.DataError, match="a.csv, b.jsonl; name the one"):
        tables.find(tmp_path)


def test_a_damaged_quote_costs_its_own_lines_alone(tmp_path):
    text = 'file,caption\na.jpg,one\nb.jpg,"two" more\nc.jpg,three\nd.jpg,"four\ne.jpg,five\n'
    found = tables.read(table(tmp_path, "a.csv", text))
    assert [entry.file for entry in found.entries] == ["a.jpg", "c.jpg"]
    assert [place.rpartition(":")[2] for place, _ in found.bad] == ["3", "5"]
    assert "lines 5 to 6" in found.bad[1][1]
