"""What `tools.convert_weights` asks of a system, and what several systems answer alike.

A system takes part by having a module `systems/<system>/conversion.py` with

    FORMATS                        the names of the layouts that it writes
    read(args) -> Weights          a released checkpoint, or one of another program
    write(args, weights) -> (number of tensors, {file name: sha256})
    add_flags(parser)              optional: flags of its own
    own_part(params) -> params     optional: of a run, what belongs into a file

`Network` is that module for a network whose weights have a module here with `layout_of`,
`config_of`, `from_tensors`, `to_hf` and the rest, as `weights.llama` has.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from vlm_jax.weights import convert, export, readers

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What was read: parameters with their config, and the words of the report.

    Attributes:
      read: what was found, one line.
      ignored: names of tensors that are not used.
      source: the file, or "" where the flag says it.
    """

    cfg: Any
    params: Mapping[str, Any]
    dtype: str
    read: str
    ignored: Sequence[str] = ()
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Network:
    """Conversions of a network that has a public layout of its own.

    Attributes:
      name: of the system, in files of ours.
      network: the module of its weights.
      open: path -> lazy tensors.
    """

    name: str
    network: ModuleType
    open: Any = readers.read
    FORMATS = ("hf", "native")

    def read(self, args: argparse.Namespace) -> Weights:
        """Released weights, in any layout that the network knows.

        Raises:
          ValueError: no such preset. WeightsError: tensors that are missing, extra or misshapen.
        """
        tensors = self.open(args.source)
        layout, presets = self.network.layout_of(tensors), self.network.PRESETS
        if args.preset and args.preset not in presets:
            raise ValueError(f"no preset {args.preset!r}; there are {', '.join(presets)}")
        cfg = presets[args.preset] if args.preset else self.network.config_of(tensors, args.source)
        skipped = convert.ignored(tensors, self.network.ignorable(cfg))
        cfg, dtype, read = described(args, cfg, tensors, skipped, layout)
        params = self.network.from_tensors(tensors, cfg)
        return Weights(cfg, params, dtype, read, skipped, tensors.source)

    def write(self, args: argparse.Namespace, weights: Weights) -> tuple[int, dict[str, str]]:
        """A folder in the public layout, or in ours."""
        cfg, params, dtype = weights.cfg, weights.params, weights.dtype
        if args.format == "native":
            checkpoint = export.native(self.name, params, cfg, dtype)
        else:
            ids = {f"{key}_token_id": getattr(args, key) for key in ("bos", "eos")}
            ids = {key: value for key, value in ids.items() if value is not None}
            checkpoint = export.hf(self.network, params, cfg, dtype, **ids)
        return len(checkpoint.shapes), export.write(args.target, checkpoint)


def described(
    args: argparse.Namespace, cfg: Any, tensors: Any, skipped: Sequence[str], layout: str
) -> tuple[Any, str, str]:
    """(cfg that stores the dtype, dtype of the file, what was found in words)."""
    dtypes = sorted({tensors[name].dtype.name for name in tensors if name not in skipped})
    dtype = args.dtype or common_dtype(dtypes)
    read = f"{len(tensors)} tensors, {layout} layout, {', '.join(dtypes)}"
    return _stored_in(cfg, dtype), dtype, read


def common_dtype(names: Sequence[str]) -> str:
    """The smallest dtype of `DTYPES` that holds every value of the named ones.

    fp8 fits into bfloat16 and into float16; float64 is rounded.
    """
    wide = {name for name in names if not name.startswith("float8")}
    if wide <= {"bfloat16"}:
        return "bfloat16"
    return "float16" if wide == {"float16"} else "float32"


def _stored_in(cfg: Any, dtype: str) -> Any:
    """The config, or its halves, with that param_dtype."""
    halves = {
        field.name: _stored_in(value, dtype)
        for field in dataclasses.fields(cfg)
        if dataclasses.is_dataclass(value := getattr(cfg, field.name))
    }
    return dataclasses.replace(cfg, **(halves or {"param_dtype": dtype}))
