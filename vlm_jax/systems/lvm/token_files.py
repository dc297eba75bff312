"""Whether token files fit the recipe that reads them, found out before anything is trained.

Ids say nothing about the tokenizer that made them, and a model that is trained on those of another
one learns without complaint. `tools/tokenize_images` writes a manifest beside its files, which says
what they are made of; files without one (upstream's) are judged by their lengths.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from vlm_jax.data import pipeline, records, rows, shard_files, sources
from vlm_jax.models import vqgan
from vlm_jax.nn import functional
from vlm_jax.program import config as config_lib

MANIFEST = "manifest.json"
_TYPES = ("array_record", "jsonl")
_LOOKED_AT = 16  # records whose number of images is compared


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the recipe says about its ids.

    Attributes:
      tokens_per_image, codebook_size: of the tokenizer.
      sha256: gives `digest` of the recipe's tokenizer; None when it names none.
    """

    tokens_per_image: int
    codebook_size: int
    sha256: Callable[[], str] | None = None


def digest(tokenizer: Any) -> str:
    """sha256 of parameters and config of an `ImageTokenizer`: equal digests give equal ids."""
    found = hashlib.sha256(json.dumps(dataclasses.asdict(tokenizer.cfg), sort_keys=True).encode())
    for path, leaf in sorted(functional.flatten(tokenizer.params).items()):
        array = np.ascontiguousarray(leaf)
        found.update(f"{path} {array.dtype} {array.shape}".encode())
        found.update(array.view(np.uint8).data if array.size else b"")
    return found.hexdigest()


def write_manifest(folder: pathlib.Path, tokenizer: Any) -> None:
    """For folders that recipes write themselves; `tools/tokenize_images` says more."""
    cfg = dataclasses.asdict(tokenizer.cfg)
    made_of = {"tokenizer_sha256": digest(tokenizer), "tokenizer_config": cfg}
    (folder / MANIFEST).write_text(json.dumps({"made_of": made_of}) + "\n")


def check(data: pipeline.DataConfig, formatter: Any, expected: Expected, name: str) -> None:
    """Compares the token files of a mixture with the recipe; says aloud what will be cut.

    Args:
      data: of the run or of an evaluation. formatter: `format.Formatter`; others read no ids.
      expected: see there.
      name: of the section, for messages.

    Raises:
      ConfigError: files of another tokenizer, of images of another size, or of two tokenizers.
      DataError: a file is missing.
    """
    if not hasattr(formatter, "num_literals"):
        return
    seen: dict[str, str] = {}  # sha256 of a tokenizer -> a folder of its files
    for key, entry in data.mixture.items():
        if entry["type"] in _TYPES:
            place = f"{name}.mixture.{key}"
            fields = {field: x for field, x in entry.items() if field != "weight"}
            source = sources.make_source(**fields)
            _check_manifests(source.paths, expected, place, seen)
            _check_images(source, formatter, expected, place)
            _check_lengths(source, data, formatter, expected, place)


def _check_manifests(
    files: Iterable[pathlib.Path], expected: Expected, name: str, seen: dict[str, str]
) -> None:
    for folder in sorted({file.parent for file in files}):
        made_of = _made_of(folder / MANIFEST)
        if made_of is None:
            continue
        cfg = made_of.get("tokenizer_config")
        try:
            cfg = vqgan.VqganConfig(**cfg)
            found = {"tokens_per_image": cfg.tokens_per_image, "codebook_size": cfg.num_embeddings}
        except (TypeError, ValueError):
            found = {}  # of another version of this program
        for field, value in found.items():
            if value != getattr(expected, field):
                raise config_lib.ConfigError(
                    f"{name}: the files in {folder} were made with {field}={value}, and "
                    f"task.{field} is {getattr(expected, field)}; set it and the formatter's ids "
                    "accordingly, or tokenize the images again"
                )
        made_by = str(made_of["tokenizer_sha256"])
        other = next((sha for sha in seen if sha != made_by), None)
        if expected.sha256 is not None and made_by != expected.sha256():
            raise config_lib.ConfigError(
                f"{name}: the files in {folder} were made with the tokenizer {made_by[:12]}, and "
                f"task.tokenizer is {expected.sha256()[:12]} (sha256 of its weights); give the one "
                "that they were made with, or tokenize the images again (a recipe that prepares "
                "them does so when the folder is gone)"
            )
        if other is not None:
            raise config_lib.ConfigError(
                f"{name}: the files in {folder} were made with the tokenizer {made_by[:12]}, and "
                f"those in {seen[other]} with {other[:12]}; ids of two tokenizers cannot be mixed"
            )
        seen[made_by] = str(folder)


def _made_of(path: pathlib.Path) -> Mapping[str, Any] | None:
    """What a manifest says; None where there is none of ours."""
    try:
        content = records.parse_json(shard_files.read_bytes(path, 2**24))
    except records.DataError:
        return None
    made_of = content.get("made_of") if isinstance(content, dict) else None
    return made_of if isinstance(made_of, dict) and "tokenizer_sha256" in made_of else None


def _check_images(source: sources.Source, formatter: Any, expected: Expected, name: str) -> None:
    """Records of ours say how many images they hold."""
    for index in np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int)).tolist():
        try:
            record = source[index]
            images, ids = record.get("num_images"), len(formatter.encode(record)[0])
        except (records.DataError, IndexError):
            continue  # counted, or said, where it is read
        ids -= formatter.num_literals
        if type(images) is int and images > 0 and ids != images * expected.tokens_per_image:
            raise config_lib.ConfigError(
                f"{name}: {source.record_id(index)} has {images} images of {ids / images:g} ids, "
                f"and task.tokens_per_image is {expected.tokens_per_image}; was it made with "
                "another tokenizer or another --side?"
            )


def _check_lengths(
    source: sources.Source,
    data: pipeline.DataConfig,
    formatter: Any,
    expected: Expected,
    name: str,
) -> None:
    lengths, _ = rows.token_lengths(source, formatter)
    readable = int((lengths > 0).sum())
    broken = (lengths > 0) & ((lengths - formatter.num_literals) % expected.tokens_per_image > 0)
    if broken.any():
        first = int(broken.argmax())
        message = (
            f"{name}: {int(broken.sum())} of {readable} sentences are not whole images of "
            f"task.tokens_per_image={expected.tokens_per_image} ids, the first is "
            f"{source.record_id(first)} with {int(lengths[first]) - formatter.num_literals} ids"
        )
        # Some may be cut short or hold other things; most of them say that the size is wrong.
        if 2 * broken.sum() > readable:
            raise config_lib.ConfigError(
                f"{message}; were they made with another tokenizer or another --side?"
            )
        _say_once(message)
    longer = lengths > formatter.max_tokens + 1  # the last id is only a target
    if longer.any():
        fate = "go on in the next row" if data.packing == "stream" else "are cut"
        _say_once(
            f"{name}: {int(longer.sum())} of {readable} sentences are longer than a row and {fate}:"
            f" formatter.max_tokens={formatter.max_tokens}, and {int(lengths.max()) - 1} would "
            "hold the longest"
        )


@functools.cache
def _say_once(message: str) -> None:
    if jax.process_index() == 0:
        print(f"[lvm] {message}", file=sys.stderr)
