r"""Converts weights: of a run of ours, or of a released checkpoint, to any layout of its system.

    python -m vlm_jax.tools.convert_weights --system=lvm --from=runs/lvm --to=out --format=hf
    python -m vlm_jax.tools.convert_weights --system=lvm --from=params::streaming_params \
        --to=out --format=hf --dtype=bfloat16
    python -m vlm_jax.tools.convert_weights --system=nxtp --from=runs/nxtp/checkpoints/300 \
        --to=out.pth --format=upstream

    system    format      written to
    lvm       hf          a folder that transformers reads (LlamaForCausalLM)
    vqgan     hf          a folder in the released tokenizer's layout
    clip      hf          a folder that transformers reads (CLIPModel)
    clip      upstream    a file in OpenAI's names
    nxtp      upstream    a file in the reference's names; --released: what it trains, no more
    nextchat  upstream    a folder in the released layout
    lvm vqgan native      a folder in our own layout

A file's suffix says its format: .pth (torch) or .safetensors. `--from` is a work directory of ours
(its newest good step is taken), one of its steps, a folder of `model.save`, a folder or file of
released weights, or an EasyLM file behind trainstate::, trainstate_params::, params:: or
flax_params::. Sizes come from the run, the GGUF file, config.json beside the weights, the shapes,
or --preset. Every tensor must be used or be on the list of ignored ones.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from vlm_jax.machines import console, disk

if TYPE_CHECKING:
    from vlm_jax.weights.conversion import Weights

_DTYPES = ("float32", "bfloat16", "float16")
_NETWORKS = {"clip": "vlm_jax.weights.clip_conversion"}  # networks that are no systems
_ROOT = pathlib.Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    console.tolerate_any_text()
    args = _parser(argv).parse_args(argv)
    try:
        formats = _conversion(args.system).FORMATS
        if args.format not in formats:
            known = " or ".join(formats)
            raise ValueError(
                f"--system={args.system} has no --format={args.format}; it has {known}"
            )
        _run(args)
    except (ValueError, OSError) as error:
        print(f"convert_weights: {disk.explain(error, args.target)}", file=sys.stderr)
        return 1
    return 0


def _names() -> dict[str, str]:
    """System or network -> the module with its conversions; nothing is imported."""
    found = sorted(_ROOT.glob("systems/*/conversion.py"))
    systems = {path.parent.name: f"vlm_jax.systems.{path.parent.name}.conversion" for path in found}
    return systems | _NETWORKS


def _conversion(system: str) -> ModuleType:
    # Host work only.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return importlib.import_module(_names()[system])


def _parser(argv: Sequence[str] | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_weights", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--from", dest="source", required=True, help="run or checkpoint to read")
    parser.add_argument("--to", dest="target", required=True, help="folder or file to write")
    parser.add_argument("--system", required=True, choices=sorted(_names()))
    parser.add_argument("--format", required=True, choices=("hf", "native", "upstream"))
    parser.add_argument("--dtype", choices=_DTYPES, help="default: that of the source")
    parser.add_argument("--preset", default="", help="sizes, when nothing else tells them")
    for name in ("bos", "eos"):
        parser.add_argument(f"--{name}", type=int, help=f"{name}_token_id of a text model (hf)")
    text = "the moving average where a run kept one; --no-averaged takes the raw parameters"
    parser.add_argument(
        "--averaged", action=argparse.BooleanOptionalAction, default=True, help=text
    )
    # A system's own flags come from it; without one, help and mistyped flags answer at once.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--system")
    system = first.parse_known_args(argv)[0].system
    if system in _names() and hasattr(conversion := _conversion(system), "add_flags"):
        conversion.add_flags(parser.add_argument_group(f"--system={system}"))
    return parser


def _run(args: argparse.Namespace) -> None:
    import numpy as np

    from vlm_jax import loading, saving
    from vlm_jax.nn import functional

    conversion = _conversion(args.system)
    path = pathlib.Path(args.source).expanduser()
    if loading.is_of_a_run(path):
        weights = _of_run(args, path)
    elif saving.is_saved(path):
        config = saving.read_config(path)
        read = f"a saved model, from {saving.source_of(config)}"
        weights = _of_ours(args, config, lambda: saving.read_params(path), read)
    else:
        weights = conversion.read(args)
    num_tensors, digests = conversion.write(args, weights)

    sizes = (np.prod(x.shape, dtype=np.int64) for x in functional.flatten(weights.params).values())
    print(f"read      {weights.read}: {args.source}")
    print(f"ignored   {', '.join(weights.ignored) or 'none'}")
    print(
        f"wrote     {num_tensors} tensors, {sum(map(int, sizes)):,} parameters, {weights.dtype}, "
        f"{args.format} layout: {args.target}"
    )
    for name, digest in digests.items():
        print(f"sha256    {digest}  {name}")
    if weights.source not in ("", args.source):  # which file of a folder, which part of it
        print(f"source    {weights.source}")


def _of_run(args: argparse.Namespace, path: pathlib.Path) -> Weights:
    """The parameters of a run, or of one of its steps, as it was trained."""
    from vlm_jax import checkpoints
    from vlm_jax.program import config as config_lib

    try:
        step = checkpoints.find(path)
    except checkpoints.CheckpointError as error:
        raise ValueError(str(error)) from error
    config = config_lib.place(step.config, str(step.folder.parent.parent))

    def load():
        return checkpoints.load_params(step, averaged=args.averaged)

    return _of_ours(args, config, load, f"step {step.folder.name}", str(step.folder))


def _of_ours(args: argparse.Namespace, config, load, read: str, source: str = "") -> Weights:
    """The parameters that `load` gives, of a model that we configured."""
    from vlm_jax import task as task_lib
    from vlm_jax.nn import functional
    from vlm_jax.weights import conversion as conversion_lib

    if config["system"] != args.system:
        raise ValueError(
            f"{args.source} is a run of the system {config['system']!r}, not {args.system!r}"
        )
    module = task_lib.resolve(args.system, "systems")
    task = module.make_task(config["model"], **config.get("task", {}))
    params = getattr(_conversion(args.system), "own_part", lambda params: params)(load())
    flat = functional.flatten(params)
    dtypes = sorted({x.dtype.name for x in flat.values()})
    read = f"{len(flat)} parameters, {read}, {', '.join(dtypes)}"
    dtype = args.dtype or conversion_lib.common_dtype(dtypes)
    return conversion_lib.Weights(task.cfg, params, dtype, read, source=source)


if __name__ == "__main__":
    sys.exit(main())
