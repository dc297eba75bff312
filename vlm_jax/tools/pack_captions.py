r"""Packs a folder of photos with captions or labels into tar shards, which training reads fast.

    python -m vlm_jax.tools.pack_captions --input=photos --out=shards
    python -m vlm_jax.tools.pack_captions --input=photos --table=texts.csv --out=shards --side=256

Captions and labels come from a table in the folder, from --table (.csv, .tsv, .jsonl with the
columns `file` and `caption`, `label` or `labels`), or, without one, from class folders. Writes

    OUT/train/00000.tar, OUT/heldout/00000.tar   000017.jpg, 000017.txt, 000017.json (its name)
    OUT/labels/train/00000.tar.jsonl             where there are labels
    OUT/report.txt                               what was left out or said twice, and why

Held out is a share of the photos, chosen by their content. Copies of a photo are packed once.
Shards appear whole or not at all: killed, start it again with the same arguments. Exit status 1
when nothing could be packed. The recipes nxtp_own and vqgan_own take OUT as --config.path.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import images, records, sidecar
from vlm_jax.datasets import own_files, own_pictures
from vlm_jax.machines import console, disk

_KEPT = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}  # packed as they are
_QUALITY = 95  # of photos that are made smaller
_SHOWN = 5  # entries of the report on the screen
_EVERY_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    console.tolerate_any_text()
    args = _parser().parse_args(argv)
    try:
        return pack(args)
    except (records.DataError, OSError, ImportError) as error:
        print(f"pack_captions: {disk.explain(error, args.out)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npack_captions: stopped; the same command continues", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pack_captions", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, help="folder of photos, searched at any depth")
    add("--table", default="", help="default: the table in --input, if there is one")
    add("--file_column", default="", help="of the table; default: file, image, path, ...")
    add("--text_column", default="", help="of the table; default: caption, label, text, ...")
    add("--out", required=True, help="folder for the shards")
    add("--heldout", type=float, default=0.1, help="share of the photos; 0 holds nothing out")
    add("--side", type=int, default=0, help="shorter side in pixels, at most; 0: files as they are")
    add("--per_shard", type=int, default=5_000, help="photos of a shard")
    add("--threads", type=int, default=os.cpu_count() or 4, help="that read photos")
    return parser


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One file to write: its split, its path without suffix below the output, its photos."""

    split: str
    name: str
    files: Sequence[own_files.File]
    first: int  # number of the first photo, for keys


def pack(args: argparse.Namespace) -> int:
    """Writes what is missing; returns the exit code.

    Raises:
      DataError: nothing to pack, or --out holds shards made of something else.
    """
    if args.per_shard < 1 or args.threads < 1 or args.side < 0:
        raise records.DataError("--per_shard, --threads and --side cannot be so small")
    listing = own_files.find(args.input, args.file_column, args.text_column, table=args.table)
    left_out = [("line", *pair) for pair in listing.bad]
    twice = [("repeated", *pair) for pair in listing.again]
    files, others = _usable(listing)
    left_out += others
    if not files:
        _report(pathlib.Path(args.out).expanduser(), [*left_out, *twice])
        raise records.DataError(
            f"{args.input}: no photo with a caption or label; {len(left_out)} entries left out, "
            f"listed in {args.out}/report.txt"
        )
    shards = list(_shards(dataclasses.replace(listing, files=tuple(files)), args))
    out = pathlib.Path(args.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    _check_manifest(out, listing, files, args)
    notes = []
    progress = _Progress(len(files))
    with concurrent.futures.ThreadPoolExecutor(args.threads) as pool:
        for shard in shards:
            notes.append(_known(out, shard) or _write(out, listing.root, shard, args, pool))
            progress.add(len(shard.files))
    left_out += [("unreadable", *pair) for note in notes for pair in note["unreadable"]]
    packed = sum(note["packed"] for note in notes)
    _report(out, [*left_out, *twice])
    _summarize(out, packed, shards, left_out, twice)
    return 0 if packed else 1


def _usable(listing: own_files.Listing) -> tuple[list[own_files.File], list[tuple[str, str, str]]]:
    """Photos with a text, each content once, and the others as (kind, name, cause)."""
    files, left_out, seen = [], [], {}
    for file, value in zip(listing.files, own_files.hashes(listing).tolist()):
        if file.is_video:
            left_out.append(("video", file.name, "is no photo"))
        elif not file.labels and not file.captions:
            left_out.append(("unmatched", file.name, "nothing is said about it"))
        elif value in seen:
            left_out.append(("copy", file.name, f"is {seen[value]} once more"))
        else:
            seen[value] = file.name
            files.append(file)
    return files, left_out


def _shards(listing: own_files.Listing, args: argparse.Namespace) -> Iterator[_Shard]:
    held = np.zeros(len(listing.files), bool)
    if args.heldout:
        held = own_files.heldout(listing, args.heldout)
    first = 0
    for split, chosen in (("train", ~held), ("heldout", held)):
        files = [file for file, take in zip(listing.files, chosen) if take]
        for number, at in enumerate(range(0, len(files), args.per_shard)):
            part = files[at : at + args.per_shard]
            yield _Shard(split, f"{split}/{number:05d}", part, first)
            first += len(part)


def _check_manifest(out, listing, files, args) -> None:
    from vlm_jax.tools import token_shards

    content = [sidecar.fingerprint([listing.root / file.name for file in files])]
    content += [[file.labels, file.captions] for file in files]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    token_shards.check_manifest(
        out,
        {
            "input": str(listing.root.absolute()),
            "files": len(files),
            "files_sha256": digest,
            "heldout": args.heldout,
            "side": args.side,
            "per_shard": args.per_shard,
        },
    )


def _known(out: pathlib.Path, shard: _Shard) -> dict[str, Any] | None:
    """The note of a complete shard, else None."""
    try:
        note = json.loads((out / "notes" / f"{shard.name}.json").read_text())
    except (OSError, ValueError):
        return None
    return note if (out / f"{shard.name}.tar").is_file() or not note["packed"] else None


def _write(out, root, shard: _Shard, args, pool) -> dict[str, Any]:
    """Writes labels, shard and note, in this order, each under its name only when complete."""
    path, labels, unreadable, packed = out / f"{shard.name}.tar", [], [], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:

            def read(file):
                return _photo(root / file.name, args.side)

            for number, (file, photo) in enumerate(_ahead(pool, read, shard.files, args.threads)):
                if isinstance(photo, records.BadRecordError):
                    unreadable.append((file.name, str(photo)))
                    continue
                key, (suffix, content) = f"{shard.first + number:08d}", photo
                about = {"file": file.name, "labels": file.labels, "captions": file.captions}
                text = "\n".join(file.captions) or ", ".join(file.labels)
                _add(tar, f"{key}.{suffix}", content)
                _add(tar, f"{key}.txt", text.encode())
                _add(tar, f"{key}.json", json.dumps(about, ensure_ascii=False).encode())
                labels.append({"key": key, "labels": file.labels})
                packed += 1
        if packed:
            if all(line["labels"] for line in labels):
                lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in labels)
                _write_text(out / "labels" / f"{shard.name}.tar.jsonl", lines)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    note = {"packed": packed, "unreadable": unreadable}
    _write_text(out / "notes" / f"{shard.name}.json", json.dumps(note))
    return note


def _photo(path: pathlib.Path, side: int) -> tuple[str, bytes] | records.BadRecordError:
    """Suffix and content; every photo is decoded, so that none fails in training."""
    try:
        image_u8 = images.decode(path)
        suffix = _KEPT.get(path.suffix.lower())
        if side and min(image_u8.shape[:2]) > side:
            small_u8 = own_pictures.shrink(image_u8, side)
            return "jpg", images.encode(small_u8, "jpeg", quality=_QUALITY)
        return (suffix, path.read_bytes()) if suffix else ("png", images.encode(image_u8))
    except records.BadRecordError as error:
        return error
    except OSError as error:
        return records.BadRecordError(f"{path}: cannot read: {error.strerror}")


def _ahead(pool, function, files: Iterable, threads: int) -> Iterator[tuple[Any, Any]]:
    """(file, result) in order; few are held at once."""
    files, waiting = iter(files), collections.deque()
    while True:
        for file in itertools.islice(files, 2 * threads - len(waiting)):
            waiting.append((file, pool.submit(function, file)))
        if not waiting:
            return
        file, future = waiting.popleft()
        yield file, future.result()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without a time: equal input gives equal bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_text(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _report(out: pathlib.Path, entries: Sequence[tuple[str, str, str]]) -> None:
    lines = [f"{kind}\t{place}\t{cause}\n" for kind, place, cause in entries]
    _write_text(out / "report.txt", "".join(lines))
    for line in lines[:_SHOWN]:
        print(f"[pack] {line.rstrip()}", file=sys.stderr)


def _summarize(out, packed, shards, left_out, twice) -> None:
    kinds = collections.Counter(kind for kind, *_ in left_out)
    causes = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"

    def say(text):
        print(f"[pack] {text}", file=sys.stderr)

    say(
        f"{packed} photos in {len(shards)} shards; left out: {causes}; {len(twice)} lines repeat "
        f"others; all are listed in {out / 'report.txt'}"
    )
    say(f"next: python -m vlm_jax.main --config=nxtp_own.py --config.path={out} --workdir=RUN")


class _Progress:
    """A line now and then: photos, rate, time left."""

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._start_s = self._shown_s = time.monotonic()

    def add(self, count: int) -> None:
        """Counts finished photos."""
        self._done += count
        now = time.monotonic()
        if now - self._shown_s > _EVERY_S:
            self._shown_s = now
            rate = self._done / (now - self._start_s)
            rest_s = int((self._total - self._done) / rate)
            print(
                f"[pack] {self._done}/{self._total} photos  {rate:.4g} photos/s  "
                f"ETA {rest_s // 60}:{rest_s % 60:02d}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    sys.exit(main())
