"""Tar files that nobody vouches for: damage is an error, never a loop and never fewer records."""

import io
import tarfile

import numpy as np
import pytest

from tests import fuzz
from vlm_jax.data import records, sources, tar_index


def archive(members, format=tarfile.PAX_FORMAT, **fields):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def scan(tmp_path, content):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    return tar_index.scan(path)


def contents(tmp_path, content):
    """Key -> extension -> bytes."""
    groups = tar_index.samples(scan(tmp_path, content))
    return {
        key: {name: content[at : at + size] for name, (at, size) in members.items()}
        for key, members in groups.items()
    }


SMALL = [("a.jpg", b"pixels" * 100), ("a.txt", b"a dog"), ("b.jpg", b""), ("b.txt", b"a cat")]
WANTED = {"a": {"jpg": b"pixels" * 100, "txt": b"a dog"}, "b": {"jpg": b"", "txt": b"a cat"}}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(tmp_path, format):
    long = "d" * 90 + "/" + "n" * 90
    members = [*SMALL, (f"{long}.txt", "ü".encode())]
    found = contents(tmp_path, archive(members, format))
    assert found == WANTED | {long: {"txt": "ü".encode()}}


def header(size, type=tarfile.REGTYPE, name="x.txt"):
    """A header whose size is written in base 256, which may be negative."""
    info = tarfile.TarInfo(name)
    info.type = type
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("type", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"?"])
def test_sizes_below_zero(tmp_path, type):
    for size in (-512, -1, -(2**60)):
        with pytest.raises(records.DataError, match=rf"s\.tar: .*{size}"):
            scan(tmp_path, archive(SMALL)[:1536] + header(size, type) + bytes(4096))


@pytest.mark.parametrize("size", ["-512", "-1", "1e3", "", "9" * 4000])
def test_pax_sizes_that_are_none(tmp_path, size):
    content = archive([("a.txt", b"a dog")], pax_headers={"size": size})
    with pytest.raises(records.DataError, match="impossible size|cut off"):
        scan(tmp_path, content)


def test_a_pax_size_counts(tmp_path):
    assert contents(tmp_path, archive([("a.txt", b"a dog")], pax_headers={"size": "5"})) == {
        "a": {"txt": b"a dog"}
    }


def test_every_cut_is_an_error_or_loses_nothing(tmp_path):
    whole = archive(SMALL)
    for end in range(0, len(whole), 64):
        try:
            found = contents(tmp_path, whole[:end])
        except records.DataError as error:
            assert "must be complete" in str(error)
        else:
            assert found == WANTED and end >= 9 * 512


def test_damaged_headers_do_not_end_the_archive(tmp_path):
    whole = bytearray(archive(SMALL))
    second = whole.index(b"a.txt")
    whole[second] ^= 1
    with pytest.raises(records.DataError, match=f"bad checksum at byte {second}"):
        scan(tmp_path, bytes(whole))


def test_what_is_left_out_is_named(tmp_path):
    name = "n" * 500_000 + ".txt"
    content = archive([*SMALL, (name, b"long"), ("a.TXT", b"again"), ("sparse.txt", b"s")])
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    source = sources.TarShards(path)
    assert [source[i]["txt"] for i in range(len(source))] == ["again", "a cat", "s"]
    causes = {name.removeprefix(f"{path}:")[:5]: cause for name, cause in source.skipped}
    assert causes == {
        "nnnnn": "its name has 500004 bytes; at most 4096 are read",
        "a.TXT": "the name occurs twice in the shard; the last one counts",
    }
    assert all(len(name) < len(str(path)) + 300 for name, _ in source.skipped)


def test_archives_behind_each_other_are_named(tmp_path):
    found = scan(tmp_path, archive(SMALL) + archive([("c.txt", b"a cup")]))
    assert found["bad_causes"].tolist() == ["more data follow it; are these several archives?"]


def test_an_archive_far_behind_the_first_is_named(tmp_path):
    content = archive(SMALL) + bytes(2**21) + archive(SMALL)
    assert "more data follow" in scan(tmp_path, content)["bad_causes"].tolist()[0]


def test_a_pointer_in_place_of_a_shard(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    with pytest.raises(records.DataError, match="is a git-lfs pointer.*must be complete"):
        scan(tmp_path, pointer)


def test_sparse_members(tmp_path):
    content = archive([("a.txt", b"a dog")], pax_headers={"GNU.sparse.major": "1"})
    assert scan(tmp_path, content)["bad_causes"].tolist() == ["a sparse file"]
    with pytest.raises(records.DataError, match="'x.txt' is sparse"):
        scan(tmp_path, header(512, tarfile.GNUTYPE_SPARSE) + bytes(2048))


def test_damage_of_any_kind(tmp_path):
    members = [*SMALL, ("n" * 150 + ".txt", b"long"), ("ü.json", b'{"a": 1}')]
    whole = archive(members)
    path = tmp_path / "s.tar"
    for content in fuzz.mutations(whole, 400):
        path.write_bytes(content)
        with fuzz.bounded(megabytes=8):
            try:
                index = tar_index.scan(path)
                groups = tar_index.samples(index)
            except records.DataError:
                continue
        places = np.array([place for group in groups.values() for place in group.values()])
        assert (places >= 0).all() and (places.sum(1) <= len(content)).all()
