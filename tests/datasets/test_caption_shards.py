"""Caption shards with and without extracted labels, the paper's splits, and image lists."""

import io
import json
import os
import pickle
import tarfile

import pytest

from tests import fuzz
from vlm_jax.data import records, sources
from vlm_jax.datasets import caption_shards


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_shard(path, captions):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, caption in captions.items():
            for extension, content in (("jpg", b"pixels"), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_labels(folder, shard, lines):
    file = caption_shards.labels_file(folder, shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_captions_without_labels(tmp_path):
    write_shard(tmp_path / "deep" / "er" / "0.tar", {"x": "a dog"})
    source = sources.make_source(type="caption_shards", path=str(tmp_path))
    assert len(source) == 1 and source[0]["txt"] == "a dog" and "labels" not in source[0]
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


def test_labels_join_their_samples(tmp_path):
    shards = [write_shard(tmp_path / "s" / f"{i}.tar", {f"{i}a": "x", f"{i}b": "y"}) for i in "01"]
    for shard, i in zip(shards, "01", strict=True):
        lines = [{"key": f"{i}a", "labels": [i]}, {"key": f"{i}b", "error": "bad"}]
        write_labels(tmp_path / "labels", shard, lines)
    source = caption_shards.CaptionShards(str(tmp_path / "s"), labels=str(tmp_path / "labels"))
    assert [source[i]["labels"] for i in (0, 2)] == [["0"], ["1"]]
    with pytest.raises(records.BadRecordError, match="1b: no labels: bad"):
        source[3]
    assert pickle.loads(pickle.dumps(source))[2]["labels"] == ["1"]


def test_labels_of_another_shard_are_refused(tmp_path):
    shard = write_shard(tmp_path / "s" / "0.tar", {"a": "x", "b": "y"})
    labels = tmp_path / "labels"
    with pytest.raises(records.DataError, match="no labels of .*0.tar .*\n.*extract_labels"):
        caption_shards.CaptionShards(str(shard), labels=str(labels))
    write_labels(labels, shard, [{"key": "a", "labels": []}])
    with pytest.raises(records.DataError, match="2 samples, but labels of 1"):
        caption_shards.CaptionShards(str(shard), labels=str(labels))
    write_labels(labels, shard, [{"key": "b", "labels": []}, {"key": "a", "labels": []}])
    source = caption_shards.CaptionShards(str(shard), labels=str(labels))
    with pytest.raises(records.DataError, match="labels of 'b', where those of .*:a were expected"):
        source[0]


def test_splits_of_the_paper(tmp_path):
    write_shard(tmp_path / "coco" / "coco_valid" / "0.tar", {"a": "x"})
    source = sources.make_source(type="caption_shards", path=str(tmp_path), split="coco_valid")
    assert len(source) == 1
    with pytest.raises(records.DataError, match="no split 'coco_test'; known: cc3m_train"):
        caption_shards.CaptionShards(path=str(tmp_path), split="coco_test")
    with pytest.raises(records.DataError, match="'sbu_train' should be in .*sbu/sbu"):
        caption_shards.CaptionShards(path=str(tmp_path), split="sbu_train")
    with pytest.raises(records.DataError, match="path is empty"):
        caption_shards.CaptionShards("", split="sbu_train")
    with pytest.raises(records.DataError, match="holds no .tar"):
        (tmp_path / "empty").mkdir()
        caption_shards.CaptionShards(str(tmp_path / "empty"))
    g3m = sum(caption_shards.SPLITS[name][1] for name in ("cc3m_train", "sbu_train", "coco_train"))
    assert g3m == 3_645_221  # paper sec. 4.1


def test_image_list(tmp_path):
    (tmp_path / "a:b.jpg").write_bytes(b"pixels")
    (tmp_path / "list.txt").write_text(
        "a:b.jpg : tench, Tinca tinca\n\nno names here\nmissing.jpg : cat\n"
    )
    source = sources.make_source(type="image_list", path=str(tmp_path / "list.txt"))
    assert len(source) == 2
    wanted = {"image": b"pixels", "class_names": "tench, Tinca tinca", "id": "a:b.jpg"}
    assert source[0] == wanted and pickle.loads(pickle.dumps(source))[0] == wanted
    assert [name for name, _ in source.skipped] == [f"{tmp_path / 'list.txt'}:3"]
    with pytest.raises(records.BadRecordError, match="missing.jpg: cannot read"):
        source[1]
    elsewhere = sources.make_source(
        type="image_list", path=str(tmp_path / "list.txt"), root=str(tmp_path / "x")
    )
    with pytest.raises(records.BadRecordError, match="x/a:b.jpg"):
        elsewhere[0]


def test_tar_reads_only_the_members_asked_for(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a": "a dog"})
    record = sources.TarShards([str(shard)], members=("txt",))[0]
    assert record == {"id": f"{shard}:a", "txt": "a dog"}


@pytest.mark.parametrize("labels", [None, 5, [1], {"a": 1}, "dog", ["a,b"], ["\ud800"]])
def test_labels_of_other_types_are_bad_records(tmp_path, labels):
    from vlm_jax.systems.nxtp import labels as labels_lib

    shard = write_shard(tmp_path / "s" / "0.tar", {"a": "x"})
    write_labels(tmp_path / "labels", shard, [{"key": "a", "labels": labels}])
    source = caption_shards.CaptionShards(str(shard), labels=str(tmp_path / "labels"))
    with pytest.raises(records.BadRecordError):
        labels_lib.of_record(source[0])


def test_hidden_files_and_folders_with_the_name_of_a_shard(tmp_path):
    write_shard(tmp_path / "s" / "0.tar", {"a": "x"})
    (tmp_path / "s" / "._0.tar").write_bytes(b"what a file manager leaves")
    (tmp_path / "s" / "1.tar").mkdir()
    assert len(caption_shards.CaptionShards(str(tmp_path / "s"))) == 1


def test_lists_of_things_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    names = ["pipe.jpg", "/dev/zero", "zero\0.jpg", "n" * 500, "."]
    lines = "".join(f"{name} : tench\n" for name in names)
    (tmp_path / "list.txt").write_text(lines + "x" * 100_000 + " : too long\n")
    source = sources.make_source(type="image_list", path=str(tmp_path / "list.txt"))
    assert len(source) == len(names) and len(source.skipped) == 1
    for index in range(len(source)):
        with pytest.raises(records.BadRecordError, match="cannot read|not a regular file"):
            source[index]


def test_damaged_lists(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    path = tmp_path / "list.txt"
    for content in fuzz.mutations(b"a.jpg : tench, Tinca tinca\nb/c.jpg : cat\n" * 3, 200):
        path.write_bytes(content)
        with fuzz.bounded(megabytes=8):
            source = sources.make_source(type="image_list", path=str(path))
            for index in range(len(source)):
                try:
                    assert source[index]["image"] == b"pixels"
                except records.BadRecordError:
                    pass
