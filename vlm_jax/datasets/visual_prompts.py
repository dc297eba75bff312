"""Prompts of the reference's JSONL files: images in, images (or an output file) out.

    {"input": ["a.png", "b.png"], "target": ["c.png"]}               perplexity
    {"input": ["a.png", "b.png"], "output": "made.png", "target": [...]}     generation

Relative paths are taken from the folder of the file. The record has `prompt` and `target`, lists of
uint8[H, W, 3], and `output`. A record is called by its output, or by file and line.
"""

from __future__ import annotations

import os
import pathlib

from vlm_jax.data import folders, images, records, shard_files, tiling

_MAX_BYTES = 2**30


class VisualPrompts:
    """Random-access source; every line is checked when it is made.

    Args:
      path: of the JSONL file.
      output: whether every line must name an output.

    Raises:
      DataError: a line that is no such object, pictures that do not exist, an output named twice.
    """

    skipped = ()

    def __init__(self, path: str | os.PathLike, output: bool = False):
        self._path = pathlib.Path(os.path.expanduser(os.fspath(path)))
        try:
            # Not splitlines: U+2028 and others may stand inside of a name.
            lines = shard_files.read_bytes(self._path, _MAX_BYTES).decode("utf-8").split("\n")
        except records.BadRecordError as error:
            raise records.DataError(str(error)) from error
        except UnicodeDecodeError as error:
            raise records.DataError(f"{path}: is not JSON lines in UTF-8: {error}") from error
        self._lines = [
            (number, _parse(line, f"{path}:{number}", output))
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        if not self._lines:
            raise records.DataError(f"{path}: holds no line")
        self._check_names()
        self._check_files()

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> records.Record:
        _, line = self._lines[index]
        record = {
            key: [images.decode(self._file(name)) for name in line[key]]
            for key in ("input", "target")
        }
        return {
            "prompt": record["input"],
            "target": record["target"],
            "output": line["output"],
            "id": self.record_id(index),
        }

    def record_id(self, index: int) -> str:
        """The output, or file and line."""
        number, line = self._lines[index]
        return line["output"] or f"{self._path}:{number}"

    def fingerprint(self) -> None:
        """None: derived values are not kept."""

    def longest(self, key: str) -> int:
        """Most images under "input" or "target"."""
        return max((len(line[key]) for _, line in self._lines), default=0)

    def _file(self, name: str) -> pathlib.Path:
        return pathlib.Path(folders.on_disk(self._path.parent, os.path.expanduser(name)))

    def _check_names(self) -> None:
        seen: dict[str, int] = {}
        for number, line in self._lines:
            if not line["output"]:
                continue
            try:
                place = os.path.normpath(tiling.place(".", line["output"], anywhere=True))
            except records.DataError as error:
                raise records.DataError(f"{self._path}:{number}: {error}") from error
            if seen.setdefault(place, number) != number:
                raise records.DataError(
                    f"{self._path}: lines {seen[place]} and {number} both write {line['output']!r}"
                )
        for place, number in seen.items():
            above = (str(folder) for folder in pathlib.PurePath(place).parents)
            if folder := next((folder for folder in above if folder in seen), ""):
                raise records.DataError(
                    f"{self._path}: line {seen[folder]} writes the picture {folder!r}, of which "
                    f"line {number} makes a folder"
                )

    def _check_files(self) -> None:
        named = [
            (number, name)
            for number, line in self._lines
            for key in ("input", "target")
            for name in line[key]
        ]
        # os.path takes names that no file can have for missing ones, pathlib raises.
        missing = [(number, name) for number, name in named if not os.path.isfile(self._file(name))]
        if missing:
            shown = "".join(f"\n  line {number}: {name:.200}" for number, name in missing[:8])
            more = f"\n  and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise records.DataError(
                f"{self._path}: {len(missing)} of {len(named)} pictures do not exist; relative "
                f"paths are taken from {self._path.parent or '.'}:{shown}{more}"
            )


def make_source(**fields) -> VisualPrompts:
    """For `type="visual_prompts"` in a config."""
    return VisualPrompts(**fields)


def _parse(text: str, name: str, needs_output: bool) -> dict:
    try:
        line = records.parse_json(text)
    except records.BadRecordError as error:
        raise records.DataError(f"{name}: not JSON: {error}") from error
    if not isinstance(line, dict) or "input" not in line:
        raise records.DataError(f'{name}: a line is {{"input": [paths], ...}}')
    line = {"target": [], "output": "", **line}
    for key in ("input", "target"):
        paths = line[key]
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise records.DataError(f"{name}: {key!r} is a list of paths, got {paths!r:.80}")
    if not line["input"]:
        raise records.DataError(f"{name}: 'input' is empty; LVM continues at least one image")
    if not isinstance(line["output"], str) or (needs_output and not line["output"]):
        raise records.DataError(f"{name}: 'output' must be a path, got {line['output']!r:.80}")
    return line
