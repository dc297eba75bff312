"""Pictures with captions in tar shards: CC3M, SBU, COCO, LAION and OpenImages as NXTP packs them.

A sample is STEM.jpg, STEM.txt (the caption) and perhaps STEM.json. Labels can be extracted from
the captions once (`tools/extract_labels`) and lie in a folder of their own, one file per shard:

    cc3m/cc3m/00017.tar  ->  LABELS/cc3m/00017.tar.jsonl     {"key": STEM, "labels": [...]}

in the order of the shard. The folders below a root are those of the reference; sizes: arXiv
2312.02142, sec. 4.1.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from vlm_jax.data import records, shard_files, sources

# split -> (folder below the root, pairs in the paper)
SPLITS = {
    "cc3m_train": ("cc3m/cc3m", 2_698_118),
    "cc3m_valid": ("cc3m/cc3m_valid", 12_478),
    "sbu_train": ("sbu/sbu", 828_816),
    "coco_train": ("coco/coco_train", 118_287),
    "coco_valid": ("coco/coco_valid", 5_000),
    "laion_train": ("laion115m/laion115m", 67_034_168),
    "openimages_valid": ("openimages_v7/openimages_v7_valid", 41_686),
}


class CaptionShards:
    """Random-access source of the samples, with `labels` where they were extracted.

    Args:
      path: of the shards, see `find_shards`; with a split, the folder that holds all data sets.
      split: a key of `SPLITS`; "" reads `path` itself.
      labels: folder that `tools/extract_labels` wrote; "" leaves the captions to the formatter.

    Raises:
      DataError: unknown split, no shards, or a shard without its labels.
    """

    def __init__(
        self,
        path: str | os.PathLike | Sequence[str],
        *,
        split: str = "",
        labels: str = "",
    ):
        if not path:
            raise records.DataError("path is empty; name the folder of the shards")
        files = find_shards(split_folder(path, split) if split else path)
        self._shards = sources.TarShards([str(file) for file in files])
        self.skipped = self._shards.skipped
        self._labels = None
        if labels:
            found = [labels_file(labels, file) for file in files]
            for file, shard in zip(found, files):
                if not file.is_file():
                    raise records.DataError(
                        f"no labels of {shard} ({file} is missing). Remedy:\n    python -m "
                        f"vlm_jax.tools.extract_labels --path={shard.parent} --to={labels}"
                    )
            for shard in files:
                _check_unchanged(labels, shard)
            self._labels = sources.JsonLines([str(file) for file in found])
            if len(self._labels) != len(self._shards):
                raise records.DataError(
                    f"{len(self._shards)} samples, but labels of {len(self._labels)} in {labels}; "
                    "extract the labels again"
                )

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> records.Record:
        record = self._shards[index]
        if self._labels is None:
            return record
        line, name = self._labels[index], self.record_id(index)
        if not name.endswith(f":{line.get('key')}"):
            raise records.DataError(
                f"{self._labels.record_id(index)} has the labels of {line.get('key')!r}, where "
                f"those of {name} were expected; the shard has changed, extract its labels again"
            )
        if "error" in line:
            raise records.BadRecordError(f"{name}: no labels: {line['error']}")
        return {**record, "labels": line.get("labels")}

    def record_id(self, index: int) -> str:
        """Shard and key."""
        return self._shards.record_id(index)

    def fingerprint(self) -> Any:
        """Of the shards and of the labels."""
        return [self._shards.fingerprint(), self._labels and self._labels.fingerprint()]


def split_folder(root: str | os.PathLike, split: str) -> pathlib.Path:
    """The folder of one of the paper's splits.

    Raises:
      DataError: unknown split, or no such folder.
    """
    if split not in SPLITS:
        raise records.DataError(f"no split {split!r}; known: {', '.join(SPLITS)}")
    folder = pathlib.Path(root).expanduser() / SPLITS[split][0]
    if not folder.is_dir():
        raise records.DataError(f"split {split!r} should be in {folder}, which is no folder")
    return folder


def find_shards(path: str | os.PathLike | Sequence[str]) -> list[pathlib.Path]:
    """Files, globs, or folders, which are searched for .tar at any depth; sorted.

    Raises:
      DataError: nothing is there.
    """
    entries = [path] if isinstance(path, str | os.PathLike) else list(path)
    found: list[pathlib.Path] = []
    for entry in entries:
        folder = pathlib.Path(entry).expanduser()
        if folder.is_dir():
            # Names that begin with a dot are what other systems keep beside a file.
            shards = [file for file in sorted(folder.rglob("[!.]*.tar")) if file.is_file()]
            if not shards:
                raise records.DataError(f"{folder} holds no .tar, at any depth")
            found += shards
        else:
            found += shard_files.find_files(entry)
    return found


def labels_file(folder: str | os.PathLike, shard: pathlib.Path) -> pathlib.Path:
    """Where the labels of a shard are kept: under the name of its folder and its own."""
    # Not `absolute`: the folder of "a/../b.tar" is not called "..", which would lead elsewhere.
    inner = pathlib.Path(os.path.abspath(shard)).parent.name
    return pathlib.Path(folder).expanduser() / inner / f"{shard.name.removesuffix('.gz')}.jsonl"


def note_file(folder: str | os.PathLike, shard: pathlib.Path) -> pathlib.Path:
    """Where it is kept what those labels were made of; see `stamp`."""
    target = labels_file(folder, shard)
    return target.parents[1] / ".made_of" / target.parent.name / f"{target.name}.json"


def stamp(shard: pathlib.Path) -> dict[str, Any]:
    """Name, size and time of a file: another content has another stamp."""
    status = shard.stat()
    return {"file": shard.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _check_unchanged(folder: str | os.PathLike, shard: pathlib.Path) -> None:
    try:
        note = records.parse_json(note_file(folder, shard).read_bytes())
    except (OSError, records.BadRecordError):
        return
    now = stamp(shard)
    # Not the time: it changes when a set is copied to another machine.
    if isinstance(note, dict) and note.get("file") == shard.name and note["size"] != now["size"]:
        raise records.DataError(
            f"{shard} has {now['size']} bytes, and had {note['size']} when its labels in {folder} "
            "were extracted; extract them again"
        )


def make_source(**fields) -> CaptionShards:
    """For `type="caption_shards"` in a config."""
    return CaptionShards(**fields)
