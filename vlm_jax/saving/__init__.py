"""Models to take away: one folder with all that a trained model consists of.

    model.save("my_model")                    of what `vlm_jax.load` gave
    vlm_jax.load("nxtp", "my_model")          anywhere, with equal outputs
    --config.init.run=my_model                another run starts from it

    params.safetensors    or shards of it, with Hugging Face's index; paths joined by '/'
    config.json           the system, its sections of a recipe, where it came from, versions, and
                          the SHA-256 of every other file
    tokenizer/, tokenizer.json, tokenizer.model    what the system reads besides
    README.md             a model card

In config.json '{workdir}' stands for the folder. It is written beside its place and renamed, so it
is whole or not there; what has changed since is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.nn import functional
from vlm_jax.program import config as config_lib
from vlm_jax.program import provenance
from vlm_jax.weights import bounds, convert, errors, export, readers

CONFIG, CARD = "config.json", "README.md"
FORMAT = 1
_SECTIONS = ("model", "task", "formatter")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
      name: of the run's folder, or of the weights.
      step: updates that made it; 0 where that is not known.
      averaged: whether these are the moving average of its parameters.
      started_from: the run and the weights that its training started from.
      data: the parts of the mixture that it was trained on.
    """

    name: str = ""
    step: int = 0
    averaged: bool = False
    started_from: Sequence[str] = ()
    data: Sequence[str] = ()

    def __str__(self) -> str:
        step = f" step {self.step}" if self.step else ""
        return f"{self.name}{step}{', moving average' if self.averaged else ''}"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a model consists of.

    Attributes:
      system: its name.
      sections: "model", "task", "formatter" as in a recipe, and "load": fields of `from_run`.
      params: in the training layout.
      dtype: that holds every value of them.
      files: name -> function writing the file at a path, for example a tokenizer.
      inner: folder name -> parts of another model in it.
      source: where it came from.
      title: one line for the card.
      casts: whether the parameters are cast to the compute dtype before anything else, so that they
        may be held as they are stored.
    """

    system: str
    sections: Mapping[str, Mapping[str, Any]]
    params: Mapping[str, Any]
    dtype: str
    files: Mapping[str, Callable[[pathlib.Path], None]] = dataclasses.field(default_factory=dict)
    inner: Mapping[str, Parts] = dataclasses.field(default_factory=dict)
    source: Source = Source()
    title: str = ""
    casts: bool = False


class Model:
    """What `vlm_jax.load` gives: it can be saved, and says what it is."""

    source = Source()

    def parts(self, *, copy_shipped: bool = True) -> Parts:
        """What it consists of.

        Args:
          copy_shipped: False names the weights inside it that come with the package ("tiny").
        """
        raise NotImplementedError

    def save(
        self,
        folder: str | os.PathLike,
        *,
        dtype: str = "",
        max_shard_bytes: int = export.MAX_SHARD_BYTES,
        copy_shipped: bool = True,
    ) -> dict[str, str]:
        """Writes the model into a folder that `vlm_jax.load` and `init.run` read; see `saving`.

        Args:
          folder: new, empty, or written by this function: then it is replaced.
          dtype: of the file; "" is the smallest that changes no value.
          max_shard_bytes: of one file of parameters.
          copy_shipped: see `parts`.

        Returns:
          File name -> sha256.

        Raises:
          FileExistsError: there are other things in the folder; nothing is changed.
          WeightsError: values that are not finite, or not in that dtype.
        """
        return write(self.parts(copy_shipped=copy_shipped), folder, dtype, max_shard_bytes)

    def comes_from(self, source: Source) -> Model:
        """The model itself, with a note of its source."""
        object.__setattr__(self, "source", source)  # some are frozen dataclasses
        return self

    def _described(self, cfg: Any, params: Any, more: str = "") -> str:
        """A short repr: parameters, compute dtype, source."""
        origin = f", from {self.source}" if self.source.name else ""
        more = f", {more}" if more else ""
        name = type(self).__name__
        return f"{name}({count_of(params)} parameters, {cfg.dtype}{more}{origin})"


# ---- writing -----------------------------------------------------------------------------------


def write(
    parts: Parts,
    folder: str | os.PathLike,
    dtype: str = "",
    max_shard_bytes: int = export.MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Writes a model; see `Model.save`."""
    folder = pathlib.Path(folder).expanduser().absolute()
    _require_ours(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        digests = _fill(new, parts, dtype, max_shard_bytes)
        new.chmod(0o777 & ~_umask())
        _put_in_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return digests


def _fill(folder: pathlib.Path, parts: Parts, dtype: str, max_shard_bytes: int) -> dict[str, str]:
    dtype = dtype or parts.dtype
    sections = {key: parts.sections.get(key, {}) for key in (*_SECTIONS, "load")}
    if parts.casts:
        sections["model"] = {**sections["model"], "param_dtype": dtype}
    weights = export.Checkpoint(
        tensors=convert.revert(parts.params, convert.NATIVE_RULES),
        shapes=convert.reverted_shapes(parts.params, convert.NATIVE_RULES),
        dtype=np.dtype(jnp.dtype(dtype)),
        stem="params",
        metadata={"format": "vlm_jax"},
        files={},
    )
    digests = export.write(folder, weights, max_shard_bytes)
    for name, write_file in parts.files.items():
        write_file(folder / name)
    for name, inner in parts.inner.items():
        (folder / name).mkdir()
        _fill(folder / name, inner, "", max_shard_bytes)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashed = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    config = {
        "format": FORMAT,
        "system": parts.system,
        **sections,
        "source": dataclasses.asdict(parts.source),
        "versions": provenance.versions(),
        "files": {name: digest for name, digest in hashed.items() if not name.endswith(CARD)},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    from vlm_jax.saving import model_card

    (folder / CARD).write_text(model_card.text(parts, config, dtype), encoding="utf-8")
    return digests


def _require_ours(folder: pathlib.Path) -> None:
    """Refuses to replace what `write` has not made."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another folder")
    held = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    try:
        config = _read_json(folder)
        names = set(config["files"]) | {CONFIG, CARD}
        inner = {str(pathlib.PurePosixPath(name).parent / CARD) for name in names}
        ours = held <= names | inner
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    if held and not ours:
        shown = ", ".join(sorted(held)[:5])
        raise FileExistsError(f"{folder} already holds {shown}; choose another folder")


def _put_in_place(new: pathlib.Path, folder: pathlib.Path) -> None:
    old = None
    if folder.exists() and any(folder.iterdir()):
        old = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, old)
    os.replace(new, folder)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _digest(file: pathlib.Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def section_of(made: Any) -> dict[str, Any]:
    """The section of a recipe that makes this task or formatter; without the network's config."""
    names = [field.name for field in dataclasses.fields(made) if field.name != "cfg"]
    return {name: getattr(made, name) for name in names}


def dtype_of(params: Mapping[str, Any]) -> str:
    """The smallest dtype that holds every value: the parameters' own if they have one."""
    found = {np.dtype(x.dtype).name for x in functional.flatten(params).values()}
    return found.pop() if len(found) == 1 else "float32"


def count_of(params: Any) -> str:
    """Number of parameters in words: "6.7B", "300M", "12k"."""
    count = sum(int(np.prod(x.shape, dtype=np.int64)) for x in functional.flatten(params).values())
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return str(count)


# ---- reading -----------------------------------------------------------------------------------


def is_saved(path: str | os.PathLike) -> bool:
    """Whether `write` made this folder."""
    try:
        return "format" in _read_json(pathlib.Path(path).expanduser())
    except (OSError, ValueError):
        return False


def read_config(path: str | os.PathLike) -> dict[str, Any] | None:
    """config.json of a folder of weights of ours, '{workdir}' filled in; None for other folders.

    Raises:
      WeightsError: it was written by a newer version, or is damaged.
    """
    folder = pathlib.Path(path).expanduser().absolute()
    try:
        config = _read_json(folder)
    except (OSError, ValueError):
        return None
    if not {"system", "model"} <= set(config):
        return None
    for key in (*_SECTIONS, "load", "source", "files"):
        if not isinstance(config.get(key, {}), dict):
            raise errors.WeightsError(f"{folder / CONFIG}: {key} is no section")
    if config.get("format", FORMAT) != FORMAT:
        raise errors.WeightsError(
            f"{folder}: written in format {config['format']!r}, this version reads {FORMAT}; "
            "install a newer vlm_jax"
        )
    return config_lib.place(config, str(folder))


def read_params(path: str | os.PathLike) -> dict[str, Any]:
    """The parameters of a saved model as they lie there.

    Raises:
      WeightsError: files have changed since they were written.
    """
    path = pathlib.Path(path).expanduser()
    check_files(path)
    tensors = readers.read(path)
    return functional.unflatten({name: tensors[name] for name in tensors})


def check_files(path: str | os.PathLike) -> None:
    """Raises WeightsError when a file is missing or has changed since the folder was written."""
    folder = pathlib.Path(path).expanduser()
    files = _read_json(folder).get("files", {})
    for name, digest in files.items() if isinstance(files, Mapping) else ():
        pure = pathlib.PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise errors.WeightsError(f"{folder / CONFIG} names {name!r}, which is outside")
        if not (folder / name).is_file():
            raise errors.WeightsError(f"{folder / name} is missing")
        if _digest(folder / name) != digest:
            raise errors.WeightsError(
                f"{folder / name} has changed since it was saved; its SHA-256 differs from the one "
                f"in {CONFIG}"
            )


def source_of(config: Mapping[str, Any]) -> Source:
    """The source that config.json tells of; an empty one where it tells of none."""
    found = config.get("source")
    known = {field.name for field in dataclasses.fields(Source)}
    return Source(**{k: v for k, v in found.items() if k in known}) if found else Source()


def source_of_run(name: str, step: int, config: Mapping[str, Any], averaged: bool) -> Source:
    """The source of a model that a run made.

    Args:
      name: of the run's folder.
      step: of its checkpoint.
      config: its recipe.
      averaged: whether the moving average is taken.
    """
    init = config.get("init") or {}
    started = [f"{key}={init[key]}" for key in ("run", "upstream") if init.get(key)]
    mixture = (config.get("data") or {}).get("mixture") or {}
    data = [f"{part} ({fields.get('type', '?')})" for part, fields in mixture.items()]
    return Source(name, step, averaged, tuple(started), tuple(data))


def _read_json(folder: pathlib.Path) -> dict[str, Any]:
    return bounds.read_json(folder / CONFIG)
