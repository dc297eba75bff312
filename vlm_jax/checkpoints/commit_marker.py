"""The commit marker: a folder counts only if COMMIT.json is in it and every file matches it.

COMMIT.json holds the size and SHA-256 of every other file and is written last, atomically. A save
that was cut off has no marker; a truncated file or a flipped bit no longer matches it. Nothing
here knows what the files are; see checkpoints.py.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os

from etils import epath

MARKER = "COMMIT.json"


def commit(folder: epath.Path) -> None:
    """Marks the files now in the folder as complete, after they have reached the disk."""
    files = _digests(folder, _files(folder), sync=True)
    write_durably(folder / MARKER, json.dumps({"files": files}, indent=1))


def is_committed(folder: epath.Path) -> bool:
    """Whether the marker is there; says nothing about the files."""
    return (folder / MARKER).exists()


def revoke(folder: epath.Path) -> None:
    """Removes the marker, so that a removal that is cut off leaves nothing that looks whole."""
    (folder / MARKER).unlink()


def why_bad(folder: epath.Path) -> str:
    """One line saying why a step folder cannot be trusted; "" if it can."""
    try:
        if not (folder / MARKER).exists():
            if not any(folder.iterdir()):
                return f"{folder} is empty"
            return f"{folder} has no {MARKER}; its save did not finish"
        files = json.loads((folder / MARKER).read_text())["files"]
        sizes = {name: (leaf["bytes"], leaf["sha256"]) for name, leaf in files.items()}
        if not sizes:
            return f"{folder / MARKER} lists no files"
        for name, (num_bytes, _) in sizes.items():
            if epath.Path(name).is_absolute() or ".." in epath.Path(name).parts:
                return f"{folder / MARKER} names {name!r}, which is outside"
            if not (folder / name).exists():
                return f"{folder / name} is missing"
            length = (folder / name).stat().length
            if length != num_bytes:
                return f"{folder / name} has {length} bytes of {num_bytes}; it was cut off"
        for name, found in _digests(folder, list(files), sync=False).items():
            if found["sha256"] != sizes[name][1]:
                return f"{folder / name} has changed since it was saved; its digest differs"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{folder} cannot be read: {one_line(error)}"
    return ""


def write_durably(path: epath.Path, text: str) -> None:
    """Writes whole or not at all, also when the machine loses power."""
    if not is_local(path):
        path.write_text(text)  # objects in a bucket appear whole
        return
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk; Python does not say which file
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise OSError(error.errno, error.strerror, str(path)) from error
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_local(path: epath.Path) -> bool:
    """False for buckets such as gs://."""
    return "://" not in str(path)


def one_line(error: BaseException) -> str:
    """Type and message of an error, cut to a length a person reads."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + ' ...'}"


def _files(folder: epath.Path) -> list[str]:
    found = (root / name for root, _, names in folder.walk() for name in names)
    return sorted(str(path.relative_to(folder)) for path in found if path.name != MARKER)


def _digests(folder: epath.Path, names: list[str], sync: bool) -> dict[str, dict]:
    """{file: {"bytes", "sha256"}}, several files at a time (hashing releases the GIL)."""

    def one(name):
        with (folder / name).open("rb") as file:
            if sync and is_local(folder):
                os.fsync(file.fileno())  # the data must reach the disk before the marker does
            digest = hashlib.sha256()
            num_bytes = 0
            while block := file.read(1 << 22):
                digest.update(block)
                num_bytes += len(block)
        return {"bytes": num_bytes, "sha256": digest.hexdigest()}

    with concurrent.futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
