r"""Converts checkpoints between Hugging Face, EasyLM, GGUF and our own layout.

    python -m vlm_jax.tools.convert_weights --system=lvm --from=LVM_ckpts --to=out --format=native
    python -m vlm_jax.tools.convert_weights --system=lvm --from=params::streaming_params \
        --to=out --format=hf --dtype=bfloat16

`--from` is a file, a folder, or an EasyLM file behind trainstate::, trainstate_params::, params::
or flax_params::. The config comes from the GGUF file, from config.json beside the weights, from
the shapes, or from --preset. Every tensor must be used or be on the list of ignored ones.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from vlm_jax import console

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    console.tolerate_any_text()
    parser = argparse.ArgumentParser(
        prog="convert_weights", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--from", dest="source", required=True, help="checkpoint to read")
    parser.add_argument("--to", dest="target", required=True, help="folder to write")
    parser.add_argument("--system", required=True, choices=("lvm", "vqgan"))
    parser.add_argument("--format", required=True, choices=("hf", "native"))
    parser.add_argument("--dtype", choices=_DTYPES, help="default: that of the source")
    parser.add_argument("--preset", default="", help="sizes, when nothing else tells them")
    for name in ("bos", "eos"):
        parser.add_argument(f"--{name}", type=int, help=f"{name}_token_id of a text model (hf)")
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 1
    return 0


def common_dtype(names: Sequence[str]) -> str:
    """The smallest dtype of `_DTYPES` that holds every value of the named ones.

    fp8 fits into bfloat16 and into float16; float64 is rounded.
    """
    wide = {name for name in names if not name.startswith("float8")}
    if wide <= {"bfloat16"}:
        return "bfloat16"
    return "float16" if wide == {"float16"} else "float32"


def _preset(presets, name: str):
    if name not in presets:
        raise ValueError(f"no preset {name!r}; there are {', '.join(presets)}")
    return presets[name]


def _run(args: argparse.Namespace) -> None:
    # After the flags, so that --help and a mistyped flag answer at once. Host work only.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import dataclasses

    import numpy as np

    from vlm_jax.nn import functional
    from vlm_jax.weights import convert, export, llama, readers, vqgan

    network = {"lvm": llama, "vqgan": vqgan}[args.system]
    tensors = readers.read(args.source)
    layout = network.layout_of(tensors)
    cfg = (
        _preset(network.PRESETS, args.preset)
        if args.preset
        else network.config_of(tensors, args.source)
    )
    skipped = convert.ignored(tensors, network.ignorable(cfg))
    dtypes = sorted({tensors[name].dtype.name for name in tensors if name not in skipped})
    dtype = args.dtype or common_dtype(dtypes)
    cfg = dataclasses.replace(cfg, param_dtype=dtype)
    params = network.from_tensors(tensors, cfg)
    if args.format == "hf":
        ids = {f"{key}_token_id": getattr(args, key) for key in ("bos", "eos")}
        ids = {key: value for key, value in ids.items() if value is not None}
        checkpoint = export.hf(network, params, cfg, dtype, **ids)
    else:
        checkpoint = export.native(args.system, params, cfg, dtype)
    digests = export.write(args.target, checkpoint)

    count = sum(int(np.prod(x.shape, dtype=np.int64)) for x in functional.flatten(params).values())
    print(f"read      {len(tensors)} tensors, {layout} layout, {', '.join(dtypes)}: "
          f"{args.source}")  # fmt: skip
    print(f"ignored   {', '.join(skipped) or 'none'}")
    print(f"wrote     {len(checkpoint.shapes)} tensors, {count:,} parameters, {dtype}, "
          f"{args.format} layout: {args.target}")  # fmt: skip
    for name, digest in digests.items():
        print(f"sha256    {digest}  {name}")
    if tensors.source != args.source:  # which file of a folder, which part of it
        print(f"source    {tensors.source}")


if __name__ == "__main__":
    sys.exit(main())
