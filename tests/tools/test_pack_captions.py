"""Folders with captions or labels as tar shards."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.datasets import own_data
from vlm_jax.datasets import caption_shards, own_pictures
from vlm_jax.tools import pack_captions


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def pack(folder, out, *more):
    return pack_captions.main([f"--input={folder}", f"--out={out}", *more])


def report(out):
    return [line.split("\t") for line in (out / "report.txt").read_text().splitlines()]


def test_captions(tmp_path, capsys):
    folder, out = own_data.captioned(tmp_path / "photos", count=12), tmp_path / "out"
    shutil.copy(folder / "3.png", folder / "30.png")
    (folder / "broken.png").write_bytes(b"no picture")
    own_data.photo(folder / "silent.png", 55)
    with (folder / "captions.csv").open("a") as stream:
        stream.write('gone.png,x\nbroken.png,x\n30.png,x\n0.png,"a blue block, on a wall"\n')
    assert pack(folder, out, "--per_shard=4") == 0
    assert sorted((kind, cause.partition(":")[0]) for kind, _, cause in report(out)) == [
        ("copy", "is 3.png once more"),
        ("line", "no file gone.png"),
        ("repeated", "says of 0.png what was said"),
        ("unmatched", "nothing is said about it"),
        ("unreadable", str(folder / "broken.png")),
    ]
    said = capsys.readouterr().err
    assert "12 photos in" in said and f"--config.path={out}" in said
    parts = [own_pictures.make_source(path=str(out), split=s) for s in ("train", "heldout")]
    found = [part[i] for part in parts for i in range(len(part))]
    assert len(found) == 12 and all(len(part) for part in parts)
    for record in found:
        name = record["json"]["file"]
        assert record["png"] == (folder / name).read_bytes()  # as it is
        assert record["txt"] == record["json"]["captions"][0]
    # The split is the recipes' own: by content.
    direct = own_pictures.make_source(path=str(folder), split="heldout", heldout=0.1, texts=True)
    names = {direct.record_id(i) for i in range(len(direct))} - {"broken.png", "30.png"}
    assert {parts[1][i]["json"]["file"] for i in range(len(parts[1]))} == names


def test_labels_and_smaller_photos(tmp_path):
    folder, out = own_data.class_folders(tmp_path / "photos", count=4), tmp_path / "out"
    assert pack(folder, out, "--heldout=0", "--side=16") == 0
    source = caption_shards.CaptionShards(str(out / "train"), labels=str(out / "labels"))
    assert [source[i]["labels"] for i in (0, 7)] == [["cat"], ["golden retriever"]]
    assert Image.open(io.BytesIO(source[0]["jpg"])).size == (21, 16)
    assert not (out / "heldout").exists()


def test_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    folder = own_data.captioned(tmp_path / "photos", count=10)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = "--heldout=0", "--per_shard=4"
    assert pack(folder, whole, *options) == 0
    real, calls = pack_captions._write, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(pack_captions, "_write", killed)
    assert pack(folder, parts, *options) == 130
    assert pack(folder, parts, *options) == 0
    assert len(calls) == 4  # the first shard was kept
    shards = sorted(path.name for path in (whole / "train").iterdir())
    assert shards == ["00000.tar", "00001.tar", "00002.tar"]
    for name in shards:
        assert (whole / "train" / name).read_bytes() == (parts / "train" / name).read_bytes()
    own_data.photo(folder / "3.png", 77)
    assert pack(folder, parts, *options) == 1
    assert "made of something else" in capsys.readouterr().err


@pytest.mark.parametrize("make, message", [
    (lambda folder: own_data.photo(folder / "a.png", 1), "no photo with a caption or label"),
    (lambda folder: folder.mkdir(), "holds no file"),
    (lambda folder: None, "no such folder"),
])  # fmt: skip
def test_nothing_is_said_and_is_status_1(make, message, tmp_path, capsys):
    make(tmp_path / "photos")
    assert pack(tmp_path / "photos", tmp_path / "out") == 1
    assert message in capsys.readouterr().err


def test_only_broken_photos_are_status_1(tmp_path):
    folder = tmp_path / "photos"
    (folder / "cat").mkdir(parents=True)
    for name in "ab":
        (folder / "cat" / f"{name}.png").write_bytes(name.encode())
    assert pack(folder, tmp_path / "out") == 1
    assert [kind for kind, *_ in report(tmp_path / "out")] == ["unreadable", "unreadable"]


def test_odd_formats_become_png(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(2):
        Image.fromarray(np.full((9, 9, 3), 100 * n, np.uint8)).save(folder / f"{n}.bmp")
    (folder / "t.jsonl").write_text(
        "".join(json.dumps({"image": f"{n}.bmp", "caption": "x"}) + "\n" for n in range(2))
    )
    assert pack(folder, tmp_path / "out", "--heldout=0") == 0
    with tarfile.open(tmp_path / "out/train/00000.tar") as tar:
        names = [member.name for member in tar]
    assert names[:3] == ["00000000.png", "00000000.txt", "00000000.json"]
