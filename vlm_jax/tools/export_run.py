r"""Turns a run of vqgan or lvm into a small folder that `vlm_jax.load` and recipes read.

    python -m vlm_jax.tools.export_run --workdir=runs/vqgan --to=my_tokenizer
    python -m vlm_jax.tools.export_run --workdir=runs/lvm --to=my_lvm

Writes params.safetensors and config.json. Halving the precision moves a few ids of a tokenizer to
a neighbouring code: tokenize with the exported weights, never with the run and its export side by
side. The folder of an lvm names its tokenizer, which stays where it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vlm_jax import console


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    console.tolerate_any_text()
    parser = argparse.ArgumentParser(
        prog="export_run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of a run of vqgan or lvm")
    parser.add_argument("--to", required=True, help="folder to write; holds no weights yet")
    parser.add_argument("--dtype", default="float16", choices=("float32", "bfloat16", "float16"))
    text = "the moving average where the run kept one; --no-averaged takes the raw parameters"
    action = argparse.BooleanOptionalAction
    parser.add_argument("--averaged", action=action, default=True, help=text)
    args = parser.parse_args(argv)
    try:
        written = export(args.workdir, args.to, dtype=args.dtype, averaged=args.averaged)
    except (ValueError, OSError) as error:
        print(f"export_run: {error}", file=sys.stderr)
        return 1
    for name, digest in written.items():
        print(f"sha256    {digest}  {name}")
    return 0


def export(
    workdir: str, folder: str, *, dtype: str = "float16", averaged: bool = True
) -> dict[str, str]:
    """Writes the parameters of the newest good checkpoint.

    Args:
      workdir: of the run.
      folder: must not hold weights yet.
      dtype: of the file.
      averaged: take the moving average where the run kept one.

    Returns:
      File name -> sha256.

    Raises:
      ValueError: nothing good is there, a run of another system, or values that the dtype cannot
        hold.
      FileExistsError: the folder holds weights.
    """
    from vlm_jax import checkpoints
    from vlm_jax import task as task_lib
    from vlm_jax.weights import export as export_lib

    try:
        step = checkpoints.find(workdir)
    except checkpoints.CheckpointError as error:
        raise ValueError(str(error)) from error
    recipe = step.config
    system = recipe["system"]
    if system not in ("vqgan", "lvm"):
        raise ValueError(
            f"{workdir} is a run of the system {system!r}, not of 'vqgan' or 'lvm'; "
            "python -m vlm_jax.tools.convert_weights writes the weights of the others"
        )
    module = task_lib.resolve(system, "systems")
    cfg = module.make_task(recipe["model"], **recipe.get("task", {})).cfg
    params = checkpoints.load_params(step, averaged=averaged)
    exported = export_lib.native(system, params, cfg, dtype)
    if system == "lvm":  # a tokenizer is its network, a language model has a task besides
        exported.files["config.json"].update(
            {key: recipe.get(key, {}) for key in ("task", "formatter")}
        )
    return export_lib.write(folder, exported)


if __name__ == "__main__":
    sys.exit(main())
