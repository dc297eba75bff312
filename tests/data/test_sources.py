import concurrent.futures
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import textwrap

import pytest

from vlm_jax.data import records, sources


def write_jsonl(path, lines):
    path.write_bytes(b"".join(line.encode() + b"\n" for line in lines))
    return path


def test_jsonl_leaves_out_and_names_bad_lines(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", ['{"x": 1}', "{broken", "", '{"x": "é"}', "[1, 2]", '{"x": 3}']
    )
    source = sources.make_source(type="jsonl", path=str(path))
    assert [source[i] for i in range(len(source))] == [{"x": 1}, {"x": "é"}, {"x": 3}]
    assert [source.record_id(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 4, 6)]
    assert [name for name, _ in source.skipped] == [f"{path}:2", f"{path}:5"]
    assert "JSONDecodeError" in source.skipped[0][1] and "not a JSON object" in source.skipped[1][1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"x": 1}\n'.encode("utf-16"), "is UTF-16, not UTF-8; save it as UTF-8"),
        ('{"x": 1}\n'.encode("utf-32"), "is UTF-16, not UTF-8; save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html>\n", "is a web page"),
    ],
)
def test_what_is_there_instead_of_jsonl(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(records.DataError, match=message):
        sources.JsonLines(tmp_path / "a.jsonl")


def test_a_key_twice_is_a_bad_record(tmp_path):
    lines = ['\ufeff{"x": 1}', '{"x": 1, "x": 2}', '{"x": {"y": 1, "y": 1}}', '{"x": 3}']
    source = sources.JsonLines(write_jsonl(tmp_path / "a.jsonl", lines))
    assert [source[i] for i in range(len(source))] == [{"x": 1}, {"x": 3}]
    assert [cause for _, cause in source.skipped] == [
        "ValueError: the key 'x' comes twice in one object",
        "ValueError: the key 'y' comes twice in one object",
    ]
    with pytest.raises(records.BadRecordError, match="the key 'a' comes twice"):
        records.unpack(b"\x82\xa1a\x01\xa1a\x02")


def test_jsonl_index_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ['{"x": 1}', '{"x": 2}'])
    assert len(sources.JsonLines(path)) == 2
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_scan", lambda path: pytest.fail("scanned again"))
        assert sources.JsonLines(path)[1] == {"x": 2}
    write_jsonl(path, ['{"x": 1}', '{"x": 2}', '{"x": 3}'])
    assert len(sources.JsonLines(path)) == 3


def test_jsonl_cut_off_while_in_use(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ['{"x": 1}', '{"x": 2}'])
    source = sources.JsonLines(path)
    os.truncate(path, 12)
    with pytest.raises(records.BadRecordError, match="the file was cut off or changed"):
        source[1]


def test_several_files_threads_and_pickling(tmp_path):
    for name in "ab":
        write_jsonl(
            tmp_path / f"{name}.jsonl", [json.dumps({"at": f"{name}{i}"}) for i in range(99)]
        )
    source = sources.make_source(type="jsonl", path=str(tmp_path / "*.jsonl"))
    wanted = [{"at": f"{name}{i}"} for name in "ab" for i in range(99)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, range(198))) == wanted
    copy = pickle.loads(pickle.dumps(source))
    assert copy[150] == wanted[150] and copy.record_id(150).endswith("b.jsonl:52")
    assert len(sources.JsonLines([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])) == 198


def test_missing_and_unknown(tmp_path):
    with pytest.raises(records.DataError, match="no such file: .*gone"):
        sources.make_source(type="jsonl", path=str(tmp_path / "gone.jsonl"))
    with pytest.raises(records.DataError, match="no data source type 'jsonlines'.*array_record"):
        sources.make_source(type="jsonlines", path="x")
    with pytest.raises(records.DataError, match="unexpected keyword argument 'paths'"):
        sources.make_source(type="jsonl", paths="x")


def add(tar, name, content, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def test_tar_groups_members_and_follows_nothing(tmp_path):
    path = tmp_path / "s-000.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "d.1/a.jpg", b"\xff\xd8")
        add(tar, "d.1/a.txt", "ü".encode())
        add(tar, "d.1/a.seg.png", b"mask")
        add(tar, "b.json", b'{"n": 1}')
        add(tar, "b.cls", b"7")
        add(tar, "evil.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "../../up.jpg", b"!")
    source = sources.make_source(type="tar", path=str(path))
    assert len(source) == 3
    assert source[0] == {
        "id": f"{path}:d.1/a",
        "jpg": b"\xff\xd8",
        "txt": "ü",
        "seg.png": b"mask",
    }
    assert source[1] == {"id": f"{path}:b", "json": {"n": 1}, "cls": 7}
    assert source.skipped == [(f"{path}:evil.jpg", "not a regular file")]
    assert sorted(os.listdir(tmp_path)) == ["s-000.tar"]  # nothing is ever extracted
    assert pickle.loads(pickle.dumps(source))[1]["cls"] == 7


def test_tar_bad_values_and_bad_archives(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.json", b"{broken")
        add(tar, "b.bin", bytes(5000))
    with pytest.raises(records.BadRecordError, match=r"s\.tar:a\.json"):
        sources.TarShards(path)[0]
    os.truncate(path, 3000)
    with pytest.raises(records.DataError, match=r"s\.tar: .*(cut off|unexpected end)"):
        sources.TarShards(path)
    packed = tmp_path / "s.tar.gz"
    packed.write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(records.DataError, match="must be complete and uncompressed"):
        sources.TarShards(packed)


def test_array_record(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "a.array_record"
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for i in range(20):
        writer.write(records.pack({"i": i, "b": bytes([i])}) if i != 13 else b"\xc1 no msgpack")
    writer.close()
    source = sources.make_source(type="array_record", path=str(path))
    assert len(source) == 20 and source[7] == {"i": 7, "b": b"\7"}
    assert source.record_id(7) == f"{path}:7"
    with pytest.raises(records.BadRecordError, match="not a msgpack record"):
        source[13]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [r["i"] for r in pool.map(source.__getitem__, [3, 5, 19] * 30)] == [3, 5, 19] * 30
    assert pickle.loads(pickle.dumps(source))[19]["i"] == 19
    raw = sources.make_source(type="array_record", path=str(path), decode="raw")
    assert raw[13] == {"bytes": b"\xc1 no msgpack"}


def test_not_an_array_record(tmp_path):
    pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "a.array_record"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(records.DataError, match=r"a\.array_record: not ArrayRecord"):
        sources.make_source(type="array_record", path=str(path))


def test_memory_and_dataset_modules():
    source = sources.make_source(type="memory", records=[{"id": "x"}, {"y": 1}])
    assert [source.record_id(i) for i in (0, 1)] == ["x", "memory:1"]
    assert source[1] == {"y": 1}


@pytest.mark.slow
def test_tfds_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    program = textwrap.dedent(
        f"""
        import sys
        import numpy as np
        import tensorflow_datasets as tfds
        from vlm_jax.data import images, records, sources

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            def _info(self):
                features = tfds.features.FeaturesDict(
                    dict(image=tfds.features.Image(shape=(None, None, 3)), label=np.int64)
                )
                return tfds.core.DatasetInfo(builder=self, features=features)
            def _split_generators(self, manager):
                return dict(train=self._generate_examples())
            def _generate_examples(self):
                for i in range(3):
                    png = images.encode(np.full((2, 2, 3), i, np.uint8))
                    yield i, dict(image=__import__("io").BytesIO(png), label=i)

        Tiny(data_dir={str(tmp_path)!r}, file_format="array_record").download_and_prepare()
        source = sources.make_source(type="tfds", name="tiny", data_dir={str(tmp_path)!r})
        found = sorted((int(source[i]["label"]), int(source[i]["image"].max())) for i in range(3))
        assert found == [(0, 0), (1, 1), (2, 2)], found
        assert source.record_id(1) == "tiny/train:1"
        try:
            sources.make_source(type="tfds", name="tiny", split="nope", data_dir={str(tmp_path)!r})
        except records.DataError as error:
            assert "split 'nope'" in str(error)
        else:
            raise AssertionError("a missing split must be an error")
        assert "tensorflow" not in sys.modules
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
