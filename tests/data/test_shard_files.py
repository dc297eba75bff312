"""Many shards with few open files, and things in folders that are no files."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tests import fuzz
from vlm_jax.data import array_records, records, shard_files, sources
from vlm_jax.datasets import visual_sentences


def open_now():
    return len(os.listdir("/proc/self/fd"))


def write_shards(folder, count, kind):
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:05d}.{kind}"
        visual_sentences.write(path, [visual_sentences.Sentence(np.arange(4) + number, 1, "s")])
    return str(folder / f"*.{kind}")


@pytest.mark.parametrize("kind", ["jsonl", "array_record"])
def test_few_files_are_open_at_once(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(shard_files, "_MOST_OPEN", 8)
    for module in (shard_files, array_records):
        module._kept_open._open.clear()
    source = sources.make_source(type=kind, path=write_shards(tmp_path / "s", 60, kind))
    before = open_now()
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(60), 20)).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.__getitem__, order))
    first = source[order[0]]
    assert found[0] == first and len({str(record["tokens"]) for record in found}) == 60
    assert [record["tokens"] for record in found] == [source[i]["tokens"] for i in order]
    assert open_now() <= before + 8
    assert source.record_id(59).endswith(f"00059.{kind}:{1 if kind == 'jsonl' else 0}")


@pytest.mark.slow
def test_ten_thousand_shards_with_256_descriptors(tmp_path):
    """Links to a few files are as many shards; the limit holds for the whole process."""
    for kind, count in (("jsonl", 2_000), ("array_record", 10_000)):
        write_shards(tmp_path / kind, 2, kind)
        for number in range(2, count):
            os.link(
                tmp_path / kind / f"0000{number % 2}.{kind}",
                tmp_path / kind / f"{number:05d}.{kind}",
            )
    program = textwrap.dedent(
        f"""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        from vlm_jax.data import pipeline
        from vlm_jax.systems.lvm import format
        formatter = format.Formatter(max_tokens=16)
        for kind in ("jsonl", "array_record"):
            mixture = {{"a": {{"type": kind, "path": {str(tmp_path)!r} + f"/{{kind}}/*.{{kind}}"}}}}
            config = pipeline.DataConfig(mixture=mixture, packing="stream", max_bad_fraction=0.0)
            with pipeline.make_batches(config, formatter, batch_size=64, seed=0) as batches:
                for _ in range(30):
                    next(batches)
                assert not batches.bad_records.count
        """
    )
    environment = {**os.environ, "VLM_JAX_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_limit_is_that_of_now(monkeypatch):
    for limit, most in ((256, 32), (1024, 128), (20_000, 512), (10, 8), (-1, 512)):
        monkeypatch.setattr(shard_files.resource, "getrlimit", lambda _, n=limit: (n, n))
        assert shard_files.most_open() == most
    kept = shard_files.Kept(lambda *stamp: stamp)
    monkeypatch.setattr(shard_files, "most_open", lambda: 2)
    for path in "abcab":
        assert kept(path, 1, 2) == (path, 1, 2) and len(kept) <= 2


def test_too_many_open_files_is_no_bad_record(tmp_path, monkeypatch):
    source = sources.make_source(type="jsonl", path=write_shards(tmp_path / "s", 3, "jsonl"))

    def full(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(shard_files.os, "open", full)
    with pytest.raises(records.DataError, match="Too many open files; raise the limit") as caught:
        source[0]
    assert not isinstance(caught.value, records.BadRecordError)


def test_a_file_that_is_gone_is_a_bad_record(tmp_path):
    for kind in ("jsonl", "array_record"):
        source = sources.make_source(type=kind, path=write_shards(tmp_path / kind, 2, kind))
        source.paths[1].unlink()
        with pytest.raises(records.BadRecordError, match="cannot read: No such file"):
            source[1]


def test_a_replaced_file_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ("one", "three"):
        path.write_text(json.dumps({"x": text}) + "\n")
        assert sources.JsonLines(path)[0] == {"x": text}
    old = sources.JsonLines(path)
    path.with_suffix(".new").write_text(json.dumps({"x": "another length"}) + "\n")
    os.replace(path.with_suffix(".new"), path)
    shard_files._kept_open._open.clear()
    with pytest.raises(records.BadRecordError, match="cut off or changed while in use"):
        old[0]


def test_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (str(tmp_path / "pipe.jsonl"), "/dev/zero"):
        with pytest.raises(records.DataError, match="is not a regular file"):
            sources.make_source(type="jsonl", path=path)
        with pytest.raises(records.BadRecordError, match="is not a regular file"):
            shard_files.read_bytes(path, 10)
    with pytest.raises(records.BadRecordError, match="5 bytes are over the limit of 4"):
        (tmp_path / "x").write_bytes(b"hello")
        shard_files.read_bytes(tmp_path / "x", 4)
    with pytest.raises(records.BadRecordError, match="cannot read"):
        shard_files.read_bytes("zero\0byte", 4)


def test_lines_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 100)
    monkeypatch.setattr(sources.lines, "__defaults__", (100,))
    path = tmp_path / "a.jsonl"
    fits = json.dumps({"x": "y" * 90})
    path.write_text("\n".join(['{"x": 1}', " " * 250 + "{}", fits, '{"x": 3}', "z" * 101]))
    source = sources.JsonLines(path)
    assert [source[i]["x"] for i in range(len(source))] == [1, "y" * 90, 3]
    assert source.skipped == [
        (f"{path}:2", "253 bytes; at most 100 are read"),
        (f"{path}:5", "101 bytes; at most 100 are read"),
    ]


def test_a_file_of_something_else_is_refused_before_all_of_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_BAD", 50)
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" * 60 + "no json\n" * 60)
    assert len(sources.JsonLines(path).skipped) == 60
    path.write_text("no json\n" * 1000)
    with pytest.raises(records.DataError, match="51 of the first 51 lines are no JSON objects"):
        sources.JsonLines(path)


def test_deep_nesting_is_a_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n{"x": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    source = sources.JsonLines(path)
    assert len(source) == 1 and "RecursionError" in source.skipped[0][1]


def test_damaged_json_lines(tmp_path):
    rows = [{"tokens": [1, 2, 3], "id": f"r{i}", "text": "é"} for i in range(4)]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / "a.jsonl"
    for content in fuzz.mutations(whole, 300):
        path.write_bytes(content)
        with fuzz.bounded(megabytes=16):
            index = sources._scan(path)
        assert len(index["lines"]) + len(index["bad_lines"]) <= content.count(b"\n") + 1


def test_damaged_array_records(tmp_path):
    (path,) = pathlib.Path(write_shards(tmp_path / "s", 1, "array_record")).parent.iterdir()
    whole = path.read_bytes()
    for number, content in enumerate(fuzz.mutations(whole, 200)):
        damaged = tmp_path / f"{number}.array_record"
        damaged.write_bytes(content)
        with fuzz.bounded(megabytes=16):
            try:
                source = array_records.ArrayRecord(damaged)
                for index in range(len(source)):
                    assert isinstance(source[index], dict)
            except records.DataError:
                pass


def test_damaged_msgpack():
    whole = records.pack({"tokens": b"\1\0\0\0" * 8, "id": "x", "list": [1, 2.5, None, "é"]})
    for content in fuzz.mutations(whole, 400):
        with fuzz.bounded(megabytes=4):
            try:
                assert isinstance(records.unpack(content), dict)
            except records.BadRecordError:
                pass


def test_damaged_arrays(tmp_path):
    np.save(tmp_path / "whole.npy", np.arange(12, dtype=np.int32).reshape(3, 4))
    whole = (tmp_path / "whole.npy").read_bytes()
    assert shard_files.map_array(tmp_path / "whole.npy").shape == (3, 4)
    np.savez(tmp_path / "two.npz", a=np.arange(3))
    os.mkfifo(tmp_path / "pipe.npy")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "empty.npy").touch()
    for name in ("two.npz", "pipe.npy", "object.npy", "empty.npy", "gone.npy"):
        with pytest.raises(records.DataError, match=name):
            shard_files.map_array(tmp_path / name)
    for number, content in enumerate(fuzz.mutations(whole, 200)):
        path = tmp_path / f"{number}.npy"
        path.write_bytes(content)
        with fuzz.bounded(megabytes=8):
            try:
                assert shard_files.map_array(path).nbytes <= len(content)
            except records.DataError:
                pass
