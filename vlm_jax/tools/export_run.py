r"""Turns a run into a folder to take away, which `vlm_jax.load` and recipes read.

    python -m vlm_jax.tools.export_run --workdir=runs/vqgan --to=my_tokenizer
    python -m vlm_jax.tools.export_run --workdir=runs/lvm --to=my_lvm
    python -m vlm_jax.tools.export_run --workdir=runs/nxtp --to=my_nxtp --dtype=float16

What `model.save` writes: parameters, config.json, the tokenizer and a card; a tokenizer that comes
with the package ("tiny") is named, not copied. The export answers as the run does. With a --dtype
of half the precision it does not: a few ids of a tokenizer move to a neighbouring code; tokenize
with the exported weights then, never with the run and its export side by side.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from vlm_jax.machines import console, disk


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    console.tolerate_any_text()
    parser = argparse.ArgumentParser(
        prog="export_run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--to", required=True, help="folder to write")
    help_ = "of the file; else the smallest that changes no value"
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="", choices=kinds, help=help_)
    text = "the moving average where the run kept one; --no-averaged takes the raw parameters"
    action = argparse.BooleanOptionalAction
    parser.add_argument("--averaged", action=action, default=True, help=text)
    parser.add_argument("--tokenizer", default="", help="in place of the one that the run names")
    args = parser.parse_args(argv)
    fields = dict(dtype=args.dtype, averaged=args.averaged, tokenizer=args.tokenizer)
    try:
        written = export(args.workdir, args.to, **fields)
    except (ValueError, OSError) as error:
        print(f"export_run: {disk.explain(error, args.to)}", file=sys.stderr)
        return 1
    for name, digest in written.items():
        print(f"sha256    {digest}  {name}")
    return 0


def export(
    workdir: str,
    folder: str,
    *,
    dtype: str = "",
    averaged: bool = True,
    tokenizer: str = "",
) -> dict[str, str]:
    """Writes the newest good checkpoint as a model to take away; see `saving`.

    Args:
      workdir: of the run.
      folder: new, empty, or of an earlier export.
      dtype: of the file; "" is the smallest that changes no value.
      averaged: take the moving average where the run kept one.
      tokenizer: in place of the one that the run names.

    Returns:
      File name -> sha256, of the files of parameters.

    Raises:
      ValueError: nothing good is there, or values that the dtype cannot hold.
      FileExistsError: the folder holds other things.
    """
    from vlm_jax import checkpoints, loading
    from vlm_jax import task as task_lib

    try:
        system = checkpoints.find(workdir).config["system"]
        fields = {"tokenizer": tokenizer} if tokenizer else {}
        from_run = task_lib.resolve(system, "systems", ["from_run"]).from_run
        if "dtype" in inspect.signature(from_run).parameters:
            fields["dtype"] = "float32"  # parameters are rounded once, in the file
        model = loading.load(system, workdir, averaged=averaged, **fields)
    except checkpoints.CheckpointError as error:
        raise ValueError(str(error)) from error
    return model.save(folder, dtype=dtype, copy_shipped=False)


if __name__ == "__main__":
    sys.exit(main())
