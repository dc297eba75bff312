import json
import os
import unicodedata

import pytest

from vlm_jax.data import folders, records
from vlm_jax.datasets import visual_prompts


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def test_lists_at_any_depth_in_natural_order(tmp_path):
    fill(tmp_path, "b/10.jpg", "b/9.PNG", "a/x.jpeg", "a/notes.txt", ".hidden/1.jpg", "b/.2.jpg")
    assert folders.list_files(tmp_path) == ["a/x.jpeg", "b/9.PNG", "b/10.jpg"]
    assert folders.by_folder(folders.list_files(tmp_path)) == {
        "a": ["a/x.jpeg"],
        "b": ["b/9.PNG", "b/10.jpg"],
    }
    (tmp_path / "a" / "back").symlink_to(tmp_path)  # a circle
    assert len(folders.list_files(tmp_path)) == 3
    with pytest.raises(records.DataError, match="holds no file that ends with .mp4"):
        folders.list_files(tmp_path, folders.VIDEOS)
    with pytest.raises(records.DataError, match="gone: no such folder"):
        folders.list_files(tmp_path / "gone")


def test_classes_are_the_first_folders():
    assert folders.by_class(["cat/1.jpg", "cat/x/2.jpg", "dog/1.jpg"]) == {
        "cat": ["cat/1.jpg", "cat/x/2.jpg"],
        "dog": ["dog/1.jpg"],
    }
    with pytest.raises(records.DataError, match="1.jpg: has no class"):
        folders.by_class(["1.jpg"])


def test_pairs_match_by_order_and_stem(tmp_path):
    photos = fill(tmp_path / "photos", "a/1.jpg", "a/2.jpg", "a/10.jpg")
    depth = fill(tmp_path / "depth", "a/1.png", "a/2.png", "a/10.jpg.geometric.png")
    assert folders.paired([photos, depth]) == [
        ("a/1.jpg", "a/1.png"),
        ("a/2.jpg", "a/2.png"),
        ("a/10.jpg", "a/10.jpg.geometric.png"),
    ]
    fill(depth, "a/11.png")
    with pytest.raises(records.DataError, match=r"photos holds 3 .*depth holds 4.*depth/a/11\.png"):
        folders.paired([photos, depth])
    (depth / "a/2.png").unlink()
    with pytest.raises(records.DataError, match=r"a/2\.jpg and .*10\.jpg\.geometric\.png stand at"):
        folders.paired([photos, depth])
    assert folders.paired([photos, depth], "order")[2] == ("a/10.jpg", "a/11.png")
    with pytest.raises(records.DataError, match="match='name' is not"):
        folders.paired([photos, depth], "name")


def test_names_of_any_kind(tmp_path, capsys):
    for name in ("1²3.jpg", "٣.jpg", "10.jpg", "9.jpg", "12:30.JFIF", "a.jp2", "b.jpe"):
        fill(tmp_path, name)
    (tmp_path / os.fsdecode(b"\xff\xe9.jpg")).write_bytes(b"")
    found = folders.list_files(tmp_path)
    assert found == [
        "a.jp2",
        "b.jpe",
        "٣.jpg",
        os.fsdecode(b"\xff\xe9.jpg"),
        "1²3.jpg",
        "9.jpg",
        "10.jpg",
        "12:30.JFIF",
    ]
    assert capsys.readouterr().err == ""


def test_what_is_left_out_is_counted(tmp_path, capsys):
    fill(tmp_path, "a.jpg", "b.TXT", "x/c.txt", "d.mp4", "README")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "there.jpg").symlink_to(tmp_path / "a.jpg")
    assert folders.list_files(tmp_path) == ["a.jpg", "there.jpg"]
    said = capsys.readouterr().err
    for part in ("3 that are no files", "2 .txt", "1 .mp4", "1 without a suffix"):
        assert part in said
    with pytest.raises(records.DataError, match=r"ends with .*\.webm.*; it holds 1 \.txt"):
        folders.list_files(tmp_path / "x", folders.VIDEOS)


def test_two_forms_of_unicode_are_one_name(tmp_path):
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    photos = fill(tmp_path / "photos", f"{composed}.jpg", "f.jpg", "ez.jpg")
    masks = fill(tmp_path / "masks", f"{apart}.png", "f.png", "ez.png")
    assert folders.paired([photos, masks]) == [
        ("ez.jpg", "ez.png"),
        ("f.jpg", "f.png"),
        (f"{composed}.jpg", f"{apart}.png"),
    ]
    assert list(folders.by_class([f"{composed}/1.jpg", f"{apart}/2.jpg"])) == [composed]


def test_listed_names_are_found_in_either_form(tmp_path):
    composed, apart = (unicodedata.normalize(form, "é/é.jpg") for form in ("NFC", "NFD"))
    for there, listed in ((composed, apart), (apart, composed)):
        root = fill(tmp_path / str(there == apart), there)
        assert folders.on_disk(root, listed) == str(root / there)
    assert folders.on_disk(tmp_path, "gone.jpg") == str(tmp_path / "gone.jpg")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"input": [f"True/{composed}"]}))
    assert len(visual_prompts.VisualPrompts(prompts)) == 1
