"""Somebody's own photos and videos."""

import pickle
import shutil
import unicodedata

import pytest

from tests.datasets import own_data
from vlm_jax.data import records, tables
from vlm_jax.datasets import own_files, own_pictures


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def source(path, **fields):
    return own_pictures.make_source(path=str(path), **fields)


def ids(found):
    return [found.record_id(i) for i in range(len(found))]


def test_class_folders_are_labels(tmp_path):
    found = source(own_data.class_folders(tmp_path), texts=True)
    assert len(found) == 16
    record = found[8]
    assert record["id"] == "golden_retriever/0.png"
    assert record["labels"] == ["golden retriever"]
    assert record["image_u8"].shape == (30, 40, 3)


def test_split_folders_are_not_classes(tmp_path, capsys):
    for split in ("train", "val"):
        own_data.class_folders(tmp_path / split, count=2)
    found = source(tmp_path, texts=True)
    assert {found[i]["labels"][0] for i in range(len(found))} == {"cat", "golden retriever"}
    assert "train, val are taken for splits" in capsys.readouterr().err


def test_a_table_says_what_is_there(tmp_path, capsys):
    own_data.captioned(tmp_path)
    own_data.photo(tmp_path / "unknown.png", 77)
    with (tmp_path / "captions.csv").open("a") as stream:
        stream.write("gone.png,a thing that is gone\n")
    found = source(tmp_path, texts=True)
    assert len(found) == 12
    assert found[1]["captions"] == ["a red block, on a wall"]
    assert [cause for _, cause in found.skipped] == ["no file gone.png"]
    assert "1 of 13 files are not in captions.csv" in capsys.readouterr().err
    assert ids(source(tmp_path / "captions.csv", texts=True)) == ids(found)
    assert len(source(tmp_path)) == 13  # without texts, all pictures


def test_names_in_a_table_are_found_by_their_end_when_it_is_clear(tmp_path):
    own_data.photo(tmp_path / "a" / "1.png", 1)
    own_data.photo(tmp_path / "b" / "1.png", 2)
    own_data.photo(tmp_path / "b" / "2.png", 3)
    (tmp_path / "t.csv").write_text("file,label\n/old/disk/2.png,x\n1.png,y\na/1,z\n2,again\n")
    listing = own_files.find(tmp_path)
    assert {file.name: file.labels for file in listing.files}["b/2.png"] == ("x",)
    assert [cause for _, cause in listing.bad] == [
        "1.png could be a/1.png or b/1.png",
        "a/1 could be a/1.png or b/1.png",
        "2 is b/2.png, which line 2 names",
    ]


def test_held_out_by_content(tmp_path):
    own_data.class_folders(tmp_path, count=30)
    train, held = (ids(source(tmp_path, split=split)) for split in ("train", "heldout"))
    assert set(train) | set(held) == set(ids(source(tmp_path))) and not set(train) & set(held)
    assert 3 <= len(held) <= 24  # of 60, expected are 12
    # A copy stays on the side of its original, whatever it is called; nothing else moves.
    shutil.copy(tmp_path / held[0], tmp_path / "cat" / "copy.png")
    shutil.copy(tmp_path / train[0], tmp_path / "cat" / "other.png")
    now = ids(source(tmp_path, split="heldout"))
    assert set(now) == {*held, "cat/copy.png"}


def test_both_sides_of_a_split_have_something(tmp_path):
    own_data.class_folders(tmp_path, classes=("cat",), count=2)
    for share in (0.01, 0.99):
        sizes = [len(source(tmp_path, split=s, heldout=share)) for s in ("train", "heldout")]
        assert sizes == [1, 1]
    (tmp_path / "cat" / "1.png").unlink()
    shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "cat" / "1.png")
    with pytest.raises(records.DataError, match="2 files with 1 different contents"):
        source(tmp_path, split="train")


def test_frames_of_videos(tmp_path):
    own_data.videos(tmp_path, count=2)
    found = source(tmp_path, frames=4)
    assert len(found) == 8 and found.record_id(1) == "clip0.mp4#0.38"
    assert found[5]["image_u8"].shape == (48, 48, 3)
    assert (found[0]["image_u8"] != found[1]["image_u8"]).any()
    with pytest.raises(records.DataError, match="all videos"):
        source(tmp_path)


def test_small_pictures_are_kept(tmp_path):
    own_data.class_folders(tmp_path, count=2)
    found = source(tmp_path, side=16)
    before = found[0]["image_u8"]
    assert before.shape == (16, 21, 3)
    shutil.rmtree(tmp_path / "cat")
    assert (found[0]["image_u8"] == before).all()
    with pytest.raises(records.BadRecordError, match="cat/1.png"):
        found[1]
    assert len(pickle.loads(pickle.dumps(found))) == 4


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(records.DataError, match="path is empty"):
        source("")
    with pytest.raises(records.DataError, match="no such folder"):
        source(tmp_path / "nothing")
    own_data.photo(tmp_path / "a.png", 1)
    with pytest.raises(records.DataError, match="none with a label or caption; put the photos"):
        source(tmp_path, texts=True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "t.csv").write_text("file,label\na.jpg,x\n")
    with pytest.raises(records.DataError, match="holds t.csv, and no photo or video"):
        source(tmp_path / "texts")
    with pytest.raises(records.DataError, match="split='test' is none of"):
        source(tmp_path, split="test")


def test_a_table_names_files_in_either_form_of_unicode(tmp_path):
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    table = tables.Table(tmp_path / "t.csv", [tables.Entry(f"{composed}.jpg", 2)], [], [])
    matched, bad = own_files.match(table, [f"sub/{apart}.jpg", "b.jpg"])
    assert list(matched) == [f"sub/{apart}.jpg"] and not bad
