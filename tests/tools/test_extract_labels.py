"""Pre-extraction of labels: formats, resuming, sharing the work, bad captions, and reading back."""

import gzip
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

from vlm_jax.data import records
from vlm_jax.datasets import caption_shards
from vlm_jax.tools import extract_labels


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_shard(path, captions):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            for extension, content in (("jpg", b"\xff picture"), ("txt", caption)):
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                content = content if isinstance(content, bytes) else content.encode()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def extract(path, folder, **options):
    return extract_labels.extract([str(path)], str(folder), tagger="textblob", **options)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shards_of_a_tree(tmp_path):
    write_shard(tmp_path / "data" / "a" / "0.tar", ["A dog and two cats", "running quickly"])
    write_shard(tmp_path / "data" / "b" / "0.tar", ["A red sofa"])
    totals = extract(tmp_path / "data", tmp_path / "labels")
    assert totals == extract_labels.Totals(files=2, captions=3, labels=3, without=1)
    assert lines_of(tmp_path / "labels" / "a" / "0.tar.jsonl") == [
        {"key": "0000", "labels": ["dog", "cat"]},
        {"key": "0001", "labels": []},
    ]
    source = caption_shards.CaptionShards(str(tmp_path / "data"), labels=str(tmp_path / "labels"))
    assert [source[i]["labels"] for i in range(3)] == [["dog", "cat"], [], ["sofa"]]
    assert source[0]["jpg"] == b"\xff picture"


def test_again_does_only_what_is_missing_or_changed(tmp_path):
    shards = [write_shard(tmp_path / "s" / f"{i}.tar", ["A dog"]) for i in range(3)]
    extract(tmp_path / "s", tmp_path / "labels")
    outputs = [caption_shards.labels_file(tmp_path / "labels", shard) for shard in shards]
    outputs[0].unlink()
    write_shard(shards[1], ["A cat", "A cup"])
    later = outputs[1].stat().st_mtime_ns + 10**9
    os.utime(shards[1], ns=(later, later))
    before = outputs[2].stat().st_mtime_ns
    totals = extract(tmp_path / "s", tmp_path / "labels")
    assert (totals.files, totals.left_alone, totals.captions) == (2, 1, 3)
    assert [line["labels"] for line in lines_of(outputs[1])] == [["cat"], ["cup"]]
    assert outputs[2].stat().st_mtime_ns == before


def test_a_kill_between_parts_loses_only_the_part(tmp_path, monkeypatch):
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"a dog\na cat {i}\n" for i in range(5)))
    calls = []
    original = extract_labels._extract

    def dies_at_the_third(unit):
        calls.append(unit.part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(unit)

    monkeypatch.setattr(extract_labels, "_extract", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        extract(path, tmp_path / "labels", rows_per_part=3)
    target = caption_shards.labels_file(tmp_path / "labels", path)
    assert not target.exists()
    monkeypatch.setattr(extract_labels, "_extract", original)
    totals = extract(path, tmp_path / "labels", rows_per_part=3)
    assert totals.captions == 5 and totals.files == 1  # two parts of 2 and 3 rows were kept
    assert [line["key"] for line in lines_of(target)] == [str(i) for i in range(1, 11)]
    assert [line["labels"] for line in lines_of(target)] == [["dog"], ["cat"]] * 5
    assert [file.name for file in target.parent.iterdir()] == [target.name]


def test_bad_captions_are_counted_and_named(tmp_path):
    shard = write_shard(tmp_path / "s" / "0.tar", ["A dog", b"\xff\xfe", "A cat"])
    totals = extract(shard, tmp_path / "labels")
    assert totals.bad == 1 and totals.captions == 3
    source = caption_shards.CaptionShards(str(shard), labels=str(tmp_path / "labels"))
    with pytest.raises(records.BadRecordError):
        source[1]
    assert source[2]["labels"] == ["cat"]


def test_a_broken_file_does_not_stop_the_others(tmp_path, capsys):
    write_shard(tmp_path / "s" / "0.tar", ["A dog"])
    (tmp_path / "s" / "1.tar").write_bytes(b"not a tar file" * 100)
    flags = [f"--path={tmp_path / 's'}", f"--to={tmp_path / 'labels'}", "--workers=0"]
    assert extract_labels.main([*flags, "--tagger=textblob"]) == 1
    said = capsys.readouterr()
    assert "1 files done" in said.out and "1.tar" in said.err


def test_json_lines(tmp_path):
    path = tmp_path / "c.jsonl"
    rows = [{"caption": "a dog"}, {"captions": ["a cat", "a cup"]}, {"url": "none"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    totals = extract(path, tmp_path / "labels")
    found = lines_of(caption_shards.labels_file(tmp_path / "labels", path))
    assert [line.get("labels") for line in found] == [["dog"], ["cat", "cup"], None]
    assert "has no text" in found[2]["error"] and totals.bad == 1


def test_two_processes_share_the_files(tmp_path):
    for i in range(5):
        write_shard(tmp_path / "s" / f"{i}.tar", ["A dog"])
    counts = [
        extract(tmp_path / "s", tmp_path / "labels", num_processes=2, process_id=i).files
        for i in range(2)
    ]
    assert counts == [3, 2]
    with pytest.raises(records.DataError, match="process_id 2 is not below 2"):
        extract(tmp_path / "s", tmp_path / "labels", num_processes=2, process_id=2)


def test_settings_and_names_must_agree(tmp_path):
    shard = write_shard(tmp_path / "s" / "0.tar", ["A dog"])
    extract(shard, tmp_path / "labels")
    (tmp_path / "labels" / "extraction.json").write_text('{"tagger": "nltk"}')
    with pytest.raises(records.DataError, match="was written with {'tagger': 'nltk'}"):
        extract(shard, tmp_path / "labels")
    write_shard(tmp_path / "x" / "s" / "0.tar", ["A cat"])
    with pytest.raises(records.DataError, match="would share"):
        extract_labels.extract([str(tmp_path)], str(tmp_path / "other"), tagger="textblob")


@pytest.mark.slow
def test_command_line_with_workers(tmp_path):
    for i in range(4):
        write_shard(tmp_path / "s" / f"{i}.tar", ["A dog", "two cats"])
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "vlm_jax.tools.extract_labels",
            f"--path={tmp_path / 's'}",
            f"--to={tmp_path / 'labels'}",
            "--tagger=textblob",
            "--workers=2",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 files done, 0 left alone, 8 captions, 8 labels")
    assert len(list((tmp_path / "labels" / "s").iterdir())) == 4


def test_a_change_is_seen_whichever_way_the_clock_went(tmp_path):
    shard = write_shard(tmp_path / "s" / "0.tar", ["A dog"])
    extract(shard, tmp_path / "labels")
    output = caption_shards.labels_file(tmp_path / "labels", shard)
    write_shard(shard, ["A cat"])  # of the same size, and older than the labels
    earlier = output.stat().st_mtime_ns - 10**12
    os.utime(shard, ns=(earlier, earlier))
    assert extract(shard, tmp_path / "labels").files == 1
    assert lines_of(output) == [{"key": "0000", "labels": ["cat"]}]
    assert extract(shard, tmp_path / "labels").left_alone == 1
    write_shard(shard, ["A cat"] * 20)
    os.utime(shard, ns=(earlier, earlier))
    with pytest.raises(records.DataError, match="bytes, and had .* when its labels .* extract"):
        caption_shards.CaptionShards(str(shard), labels=str(tmp_path / "labels"))
    assert extract(shard, tmp_path / "labels").captions == 20


def test_parts_of_an_earlier_content_are_not_joined(tmp_path, monkeypatch):
    path = tmp_path / "captions.txt"
    path.write_text("a dog\n" * 6)
    original = extract_labels._extract

    def dies_at_the_second(unit):
        if unit.part:
            raise KeyboardInterrupt
        return original(unit)

    monkeypatch.setattr(extract_labels, "_extract", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        extract(path, tmp_path / "labels", rows_per_part=3)
    monkeypatch.setattr(extract_labels, "_extract", original)
    path.write_text("a cat\n" * 6)
    os.utime(path, ns=(1, 1))
    assert extract(path, tmp_path / "labels", rows_per_part=3).captions == 6
    target = caption_shards.labels_file(tmp_path / "labels", path)
    assert [line["labels"] for line in lines_of(target)] == [["cat"]] * 6
    assert [file.name for file in target.parent.iterdir()] == [target.name]


def test_tables_and_their_column(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("url,text\nx,a dog\ny,two cats\nz\n")
    with pytest.raises(records.DataError, match="name its column"):
        extract(path, tmp_path / "labels")
    assert extract(path, tmp_path / "labels", column="text").bad == 1
    found = lines_of(caption_shards.labels_file(tmp_path / "labels", path))
    assert [line.get("labels") for line in found] == [["dog"], ["cat"], None]
    # Another column is another content.
    assert extract(path, tmp_path / "labels", column="url").files == 1


def test_a_list_of_cc3m(tmp_path):
    path = tmp_path / "Train.tsv"
    path.write_text("a dog\thttps://cats.example/sofa.jpg\n")
    extract(path, tmp_path / "labels")
    (line,) = lines_of(caption_shards.labels_file(tmp_path / "labels", path))
    assert line["labels"] == ["dog"]


def run(capsys, path, folder):
    code = extract_labels.main(
        [f"--path={path}", f"--to={folder}", "--workers=0", "--tagger=textblob"]
    )
    return code, capsys.readouterr().err


def test_status_1_when_nothing_could_be_read(tmp_path, capsys):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    code, said = run(capsys, tmp_path / "a.parquet", tmp_path / "l")
    assert code == 1 and "ends in none of .tar" in said
    (tmp_path / "a.tsv").write_text("no tabs\nat all\n")
    code, said = run(capsys, tmp_path / "a.tsv", tmp_path / "l")
    assert code == 1 and "a.tsv:1: no tab" in said
    assert "not one caption could be read of 1 files; the first: " in said
    (tmp_path / "b.txt").write_text("")
    assert run(capsys, tmp_path / "b.txt", tmp_path / "l")[0] == 1


def test_empty_captions_and_names_that_occur_twice_are_said(tmp_path, capsys):
    shard = write_shard(tmp_path / "s" / "0.tar", ["", " "])
    with tarfile.open(shard, "a") as tar:
        member = tarfile.TarInfo("0000.txt")
        tar.addfile(member, io.BytesIO())
    code, said = run(capsys, shard, tmp_path / "l")
    assert code == 0 and "warning: none of 2 captions gave a label" in said
    assert "0.tar:0000.txt: the name occurs twice in the shard" in said


def test_a_sample_without_text_is_bad_in_both_ways_of_reading(tmp_path):
    from vlm_jax.systems.nxtp import labels

    shard = write_shard(tmp_path / "s" / "0.tar", ["A dog", "A cat"])
    with tarfile.open(shard, "a") as tar:
        tar.addfile(tarfile.TarInfo("0002.jpg"), io.BytesIO())
    assert extract(shard, tmp_path / "labels").bad == 1
    with_labels = caption_shards.CaptionShards(str(shard), labels=str(tmp_path / "labels"))
    with pytest.raises(records.BadRecordError, match="no txt among"):
        with_labels[2]
    with pytest.raises(records.BadRecordError, match="has no text"):
        labels.of_record(caption_shards.CaptionShards(str(shard))[2])


def test_labels_stay_in_their_folder(tmp_path):
    write_shard(tmp_path / "deep" / "0.tar", ["A dog"])
    (tmp_path / "deep" / "er").mkdir()
    extract(tmp_path / "deep" / "er" / ".." / "0.tar", tmp_path / "out" / "labels")
    assert (tmp_path / "out" / "labels" / "deep" / "0.tar.jsonl").is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["labels"]


def test_numbers_that_cannot_be(tmp_path):
    for fields in ({"workers": -1}, {"rows_per_part": 0}):
        with pytest.raises(records.DataError, match="is too small"):
            extract(tmp_path, tmp_path / "labels", **fields)


def test_paths_given_twice_are_all_read(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"a {name}at\n")
    args = [f"--path={tmp_path / name}.txt" for name in ("a", "b")]
    assert (
        extract_labels.main([*args, f"--to={tmp_path}/out", "--workers=0", "--tagger=textblob"])
        == 0
    )
    assert "2 files done" in capsys.readouterr().out


def test_a_file_that_cannot_be_counted_is_not_tagged(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a dog\n" * 100)[:-4])
    monkeypatch.setattr(extract_labels, "_extract", lambda unit: pytest.fail("it is read again"))
    code, said = run(capsys, tmp_path / "a.txt.gz", tmp_path / "l")
    assert code == 1 and "damaged or cut off" in said
