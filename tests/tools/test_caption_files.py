"""Forms of caption files, row by row, and damaged ones."""

import csv
import gzip
import io
import itertools
import json
import tarfile

import pytest

from tests import fuzz
from vlm_jax.data import records
from vlm_jax.tools import caption_files


def tar_of(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


FORMS = {
    ".txt": ("", "a dog\nzwei Hünde\n\na cat".encode(), ["a dog", "zwei Hünde", "", "a cat"]),
    ".tsv": ("", b"a \"dog\thttp://x\na cat\thttp://y\tz\n", ['a "dog', "a cat"]),
    ".csv": (
        "text", b'\xef\xbb\xbfurl,text\nx,"a dog, and\na cat"\n\ny,two cats\n',
        ["a dog, and\na cat", "two cats"],
    ),
    ".jsonl": ("", b'{"caption": "a dog"}\n\n{"txt": "a cat", "x": 1}\n', ["a dog", "a cat"]),
    ".tar": ("", tar_of([("a.jpg", b"!"), ("a.txt", b"a dog"), ("b.txt", b"a cat")]),
             ["a dog", "a cat"]),
}  # fmt: skip
KEYS = {".txt": "1234", ".tsv": "12", ".csv": "35", ".jsonl": "13", ".tar": "ab"}


def write(tmp_path, form, content, packed=False):
    path = tmp_path / f"c{form}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def read(path, column="", start=0, stop=None):
    """(key, text or cause) of every row."""
    found = []
    for key, get in caption_files.rows(path, column, start, stop):
        try:
            text = next(iter(get().values()), None)
        except records.BadRecordError as error:
            text = error
        found.append((key, text))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_forms(tmp_path, form, packed):
    column, content, texts = FORMS[form]
    path = write(tmp_path, form, content, packed)
    assert caption_files.form_of(path) == form
    caption_files.check_column(path, column)
    wanted = list(zip(KEYS[form], texts, strict=True))
    assert read(path, column) == wanted
    assert caption_files.count(path, column) == len(wanted)
    assert read(path, column, 1, 2) == wanted[1:2]


def causes(path, column=""):
    return {key: str(x) for key, x in read(path, column) if isinstance(x, Exception)}


def test_lines_that_are_not_what_they_should_be(tmp_path, monkeypatch):
    assert causes(write(tmp_path, ".tsv", b"a dog\tx\na cat\n\tx\n\xff\ty\n")) == {
        "2": "no tab in the line: not CAPTION, tab, URL",
        "4": "not UTF-8: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    }
    found = causes(write(tmp_path, ".jsonl", b'{"caption": 1}\n[1]\n{\n{"url": 1}\n'), "caption")
    assert list(found) == ["2", "3", "4"]
    assert found["2"] == "not a JSON object" and "no 'caption' among ['url']" in found["4"]
    found = causes(write(tmp_path, ".csv", b'a,b\n1,2\n1,2,3\n"x"y,2\n\xff,2\n1,"open\n'), "a")
    assert found["3"] == "3 fields under 2 names" and found["5"] == "not UTF-8"
    assert "expected after" in found["4"] and "lines 6 to 6: unexpected end" in found["6"]
    monkeypatch.setattr(caption_files, "MAX_LINE", 50)
    long = b"x" * 60
    assert list(causes(write(tmp_path, ".txt", b"a\n" + long + b"\nb\n"))) == ["2"]
    assert list(causes(write(tmp_path, ".csv", b"a,b\n1,2\n" + long + b",1\n3,4\n"), "a")) == ["3"]
    assert list(causes(write(tmp_path, ".tar", tar_of([("a.txt", long), ("b.jpg", b"")])))) == [
        "a",
        "b",
    ]


def test_a_quote_that_never_ends_costs_one_field_at_most(tmp_path):
    rows = b"a,b\n" + b'1,"open\n' + b"2,x\n" * 50_000 + b'3,"x"\n4,y\n'
    found = read(write(tmp_path, ".csv", rows), "a")
    assert "field larger than field limit" in str(found[0][1])
    assert found[-1] == (str(50_004), "4")


def test_what_can_not_be_read_is_refused_at_once(tmp_path):
    for name in ("a.parquet", "a.json", "a", "a.gz", "a.tar.bz2", "a.tgz"):
        with pytest.raises(records.DataError, match="ends in none of .tar, .txt"):
            caption_files.form_of(tmp_path / name)
    with pytest.raises(records.DataError, match="name its column of captions with --column"):
        caption_files.check_column(write(tmp_path, ".csv", b"a,b\n"), "")
    for form in (".csv", ".tsv"):
        with pytest.raises(records.DataError, match="no column 'text' among its first line: a b"):
            caption_files.check_column(write(tmp_path, form, b"a b\n"), "text")


def test_compressed_files_have_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_files, "_FREE_BYTES", 2**16)
    for form in (".txt", ".jsonl", ".tar", ".tsv"):
        path = write(tmp_path, form, bytes(2**24), packed=True)
        assert path.stat().st_size < 2**15
        with fuzz.bounded(megabytes=8), pytest.raises(records.DataError, match="unpacks to more"):
            read(path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_damage_of_any_kind(tmp_path, form, packed):
    column, content, _ = FORMS[form]
    whole = write(tmp_path, form, content, packed).read_bytes()
    path = tmp_path / f"d{form}{'.gz' if packed else ''}"
    for damaged in fuzz.mutations(whole, 150):
        path.write_bytes(damaged)
        with fuzz.bounded(megabytes=16):
            try:
                caption_files.check_column(path, column)
                found = read(path, column)
                assert len(found) == caption_files.count(path, column)
            except records.DataError:
                continue
        assert all(isinstance(key, str) for key, _ in found)


def test_rows_are_what_the_library_for_tables_reads(tmp_path):
    texts = ["a, b", 'say "x"', "two\nlines", "", "ü"]
    stream = io.StringIO()
    csv.writer(stream).writerows([["id", "text"], *enumerate(texts)])
    path = write(tmp_path, ".csv", stream.getvalue().encode())
    assert [text for _, text in read(path, "text")] == texts
    lines = "".join(json.dumps({"text": [text]}) + "\n" for text in texts)
    path = write(tmp_path, ".jsonl", lines.encode())
    assert list(itertools.chain(*(text for _, text in read(path, "text")))) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a dog\n".encode("utf-16"), "is UTF-16, not UTF-8; save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><p>a dog", "is a web page"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_what_is_there_instead_of_captions(tmp_path, suffix, content, message):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with pytest.raises(records.DataError, match=message):
        caption_files.count(file, "caption")


def test_zero_bytes_are_no_caption(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("a dog\na cat\n".encode("utf-16-le"))
    for row in caption_files.rows(file):
        with pytest.raises(records.BadRecordError, match="UTF-16"):
            row.read()


def test_a_column_twice(tmp_path):
    (tmp_path / "a.csv").write_text("caption,caption\na dog,a cat\n")
    with pytest.raises(records.DataError, match="'caption' comes twice"):
        caption_files.check_column(tmp_path / "a.csv", "caption")
