"""Where the members of a tar file lie, for files that nobody vouches for.

Python's own iterator ends silently at a damaged header or at the end of a file that was cut off,
and follows sizes below zero for ever. Here all of that is an error.
"""

from __future__ import annotations

import os
import pathlib
import tarfile
from collections.abc import Callable, Iterator

import numpy as np

from vlm_jax.data import file_kind, records

_BLOCK = 512
_MAX_NAME = 4096  # bytes; longer paths do not exist on Linux
_MAX_EXTENSION = 2**20  # bytes of a header that extends the next one: a long name, PAX records
_MAX_REST = 2**20  # bytes behind the end that are looked at
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_OWN, _COMMON = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE

Read = Callable[[int, int], bytes]


def scan(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The regular members, each name once; what `sidecar` keeps.

    Returns:
      names uint8[bytes], joined by zero bytes; places int64[N, (offset, size)]; bad_names and
      bad_causes str[M], what was left out: links, devices, sparse files, names that are too long,
      and all but the last of members of one name.

    Raises:
      DataError: damaged, cut off, compressed.
    """
    found: dict[tuple[str, str], tuple[bytes, int, int]] = {}
    bad: list[tuple[str, str]] = []
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            for name, offset, length, cause in _members(
                lambda at, count: os.pread(stream.fileno(), count, at), size
            ):
                shown = name[:200].decode(errors="surrogateescape")
                if cause:
                    bad.append((shown, cause))
                    continue
                key = split_name(name.decode(errors="surrogateescape"))
                if key in found:
                    bad.append((shown, "the name occurs twice in the shard; the last one counts"))
                found[key] = (name, offset, length)
    except tarfile.TarError as error:
        cause = file_kind.not_data(path) or str(error)
        raise records.DataError(
            f"{path}: {cause}; shards must be complete and uncompressed (gunzip them first)"
        ) from error
    except OSError as error:
        raise records.DataError(f"{path}: cannot read: {error.strerror}") from error
    names = b"\0".join(name for name, _, _ in found.values())
    return {
        "names": np.frombuffer(names, np.uint8),
        "places": np.array([place for _, *place in found.values()], np.int64).reshape(-1, 2),
        "bad_names": np.array([name for name, _ in bad], np.str_),
        "bad_causes": np.array([cause for _, cause in bad], np.str_),
    }


def samples(index: dict[str, np.ndarray]) -> dict[str, dict[str, tuple[int, int]]]:
    """Members of `scan` by key, then by extension: (offset, size)."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    names = index["names"].tobytes().split(b"\0") if len(index["places"]) else []
    for name, (offset, size) in zip(names, index["places"].tolist(), strict=True):
        key, extension = split_name(name.decode(errors="surrogateescape"))
        groups.setdefault(key, {})[extension] = (offset, size)
    return groups


def split_name(name: str) -> tuple[str, str]:
    """Key and extension: "d.1/a.seg.PNG" -> "d.1/a", "seg.png"."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _members(read: Read, total: int) -> Iterator[tuple[bytes, int, int, str]]:
    """(name, offset and size of the content, why it cannot be used) of all but folders."""
    offset = 0
    common: dict[bytes, bytes] = {}
    own: dict[bytes, bytes] = {}
    while (block := read(offset, _BLOCK)) != bytes(_BLOCK):
        info = _header(block, offset)
        offset += _BLOCK
        if info.type in (*_OWN, _COMMON, _LONG_NAME, _LONG_LINK):
            content = _extension(read, info, offset, total)
            if info.type == _COMMON:
                common.update(_pax(content, offset))
            elif info.type in _OWN:
                own.update(_pax(content, offset))
            elif info.type == _LONG_NAME:
                own[b"path"] = content.partition(b"\0")[0]
            offset += -(-info.size // _BLOCK) * _BLOCK
            continue
        extended = common | own
        name = extended.get(b"path", info.name.encode(errors="surrogateescape"))
        size = _size(extended.get(b"size"), info.size, offset)
        own = {}
        if not info.isreg() and info.type in tarfile.SUPPORTED_TYPES:  # has no content
            if not info.isdir():
                yield name, offset, 0, "not a regular file"
            continue
        if offset + size > total:
            raise tarfile.TarError(f"member {name[:200].decode(errors='replace')!r} is cut off")
        yield name, offset, size, _cause(name, info, extended)
        offset += -(-size // _BLOCK) * _BLOCK
    # Archives end in zeros up to a whole record, of 10 KiB in general.
    if total - offset > _MAX_REST or read(offset, _MAX_REST).strip(b"\0"):
        yield b"end of the archive", offset, 0, "more data follow it; are these several archives?"


def _header(block: bytes, offset: int) -> tarfile.TarInfo:
    if len(block) < _BLOCK:
        raise tarfile.TarError(f"is cut off: no end-of-archive blocks up to byte {offset}")
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise tarfile.TarError(f"{error} at byte {offset}") from error
    if info.type == tarfile.GNUTYPE_SPARSE:
        raise tarfile.TarError(f"member {info.name!r} is sparse; make the shard without --sparse")
    return info


def _extension(read: Read, info: tarfile.TarInfo, offset: int, total: int) -> bytes:
    if not 0 <= info.size <= _MAX_EXTENSION:
        raise tarfile.TarError(
            f"a header of {info.size} bytes at byte {offset}; at most {_MAX_EXTENSION} are read"
        )
    if offset + info.size > total:
        raise tarfile.TarError(f"is cut off in the header at byte {offset}")
    return read(offset, info.size)


def _pax(content: bytes, offset: int) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n", the length counting all of it."""
    found, at = {}, 0
    while at < len(content) and content[at]:
        digits = content[at : at + 9].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = content[at + len(digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if at + length > len(content) or not equals or not value.endswith(b"\n"):
            raise tarfile.TarError(f"damaged PAX header at byte {offset}")
        found[key] = value[:-1]
        at += length
    return found


def _size(text: bytes | None, size: int, offset: int) -> int:
    if text is not None:
        size = int(text) if text.isdigit() and len(text) < 20 else -1
    if size < 0:
        raise tarfile.TarError(f"impossible size {text or size!r} in the header before {offset}")
    return size


def _cause(name: bytes, info: tarfile.TarInfo, extended: dict[bytes, bytes]) -> str:
    if not info.isreg():
        return f"of unknown type {info.type!r}"
    if any(key.startswith(b"GNU.sparse") for key in extended):
        return "a sparse file"
    if len(name) > _MAX_NAME:
        return f"its name has {len(name)} bytes; at most {_MAX_NAME} are read"
    return "a zero byte in its name" if b"\0" in name else ""
