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
    lvm vqgan native      a folder in our own layout

A file's suffix says its format: .pth (torch) or .safetensors. `--from` is a work directory of ours
(its newest good step is taken), one of its steps, a folder of `model.save`, a folder or file of
released weights, or an EasyLM file behind trainstate::, trainstate_params::, params:: or
flax_params::. Sizes come from the run, the GGUF file, config.json beside the weights, the shapes,
or --preset. Every tensor must be used or be on the list of ignored ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.machines import console, disk

_DTYPES = ("float32", "bfloat16", "float16")
_FORMATS = {
    "lvm": ("hf", "native"),
    "vqgan": ("hf", "native"),
    "clip": ("hf", "upstream"),
    "nxtp": ("upstream",),
}


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    console.tolerate_any_text()
    args = _parser().parse_args(argv)
    try:
        if args.format not in _FORMATS[args.system]:
            known = " or ".join(_FORMATS[args.system])
            raise ValueError(
                f"--system={args.system} has no --format={args.format}; it has {known}"
            )
        _run(args)
    except (ValueError, OSError) as error:
        print(f"convert_weights: {disk.explain(error, args.target)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_weights", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--from", dest="source", required=True, help="run or checkpoint to read")
    parser.add_argument("--to", dest="target", required=True, help="folder or file to write")
    parser.add_argument("--system", required=True, choices=sorted(_FORMATS))
    parser.add_argument("--format", required=True, choices=("hf", "native", "upstream"))
    parser.add_argument("--dtype", choices=_DTYPES, help="default: that of the source")
    parser.add_argument("--preset", default="", help="sizes, when nothing else tells them")
    for name in ("bos", "eos"):
        parser.add_argument(f"--{name}", type=int, help=f"{name}_token_id of a text model (hf)")
    parser.add_argument("--clip", default="", help="nxtp: the CLIP file of a released checkpoint")
    parser.add_argument("--llama", default="", help="nxtp: folder with LLaMA's params.json")
    parser.add_argument("--released", action="store_true", help="nxtp: the trained tensors alone")
    text = "the moving average where a run kept one; --no-averaged takes the raw parameters"
    parser.add_argument(
        "--averaged", action=argparse.BooleanOptionalAction, default=True, help=text
    )
    return parser


def common_dtype(names: Sequence[str]) -> str:
    """The smallest dtype of `_DTYPES` that holds every value of the named ones.

    fp8 fits into bfloat16 and into float16; float64 is rounded.
    """
    wide = {name for name in names if not name.startswith("float8")}
    if wide <= {"bfloat16"}:
        return "bfloat16"
    return "float16" if wide == {"float16"} else "float32"


def _run(args: argparse.Namespace) -> None:
    # After the flags, so that --help and a mistyped flag answer at once. Host work only.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import numpy as np

    from vlm_jax import loading, saving
    from vlm_jax.nn import functional

    path = pathlib.Path(args.source).expanduser()
    if loading.is_of_a_run(path):
        weights = _of_run(args, path)
    elif saving.is_saved(path):
        config = saving.read_config(path)
        read = f"a saved model, from {saving.source_of(config)}"
        weights = _of_ours(args, config, lambda: saving.read_params(path), read)
    elif args.system == "nxtp":
        weights = _of_nxtp(args)
    else:
        weights = _of_upstream(args)
    num_tensors, digests = _write(args, weights)

    sizes = (np.prod(x.shape, dtype=np.int64) for x in functional.flatten(weights.params).values())
    print(f"read      {weights.read}: {args.source}")
    print(f"ignored   {', '.join(weights.ignored) or 'none'}")
    print(f"wrote     {num_tensors} tensors, {sum(map(int, sizes)):,} parameters, {weights.dtype}, "
          f"{args.format} layout: {args.target}")  # fmt: skip
    for name, digest in digests.items():
        print(f"sha256    {digest}  {name}")
    if weights.source not in ("", args.source):  # which file of a folder, which part of it
        print(f"source    {weights.source}")


# ---- reading ---------------------------------------------------------------------------------


def _of_run(args: argparse.Namespace, path: pathlib.Path) -> Weights:
    """The parameters of a run, or of one of its steps, as it was trained."""
    from vlm_jax import checkpoints
    from vlm_jax.program import config as config_lib

    try:
        step = checkpoints.find(path)
    except checkpoints.CheckpointError as error:
        raise ValueError(str(error)) from error
    config = config_lib.place(step.config, str(step.folder.parent.parent))
    load = lambda: checkpoints.load_params(step, averaged=args.averaged)  # noqa: E731
    return _of_ours(args, config, load, f"step {step.folder.name}", str(step.folder))


def _of_ours(args: argparse.Namespace, config, load, read: str, source: str = "") -> Weights:
    """The parameters that `load` gives, of a model that we configured."""
    from vlm_jax import task as task_lib
    from vlm_jax.models import vqgan
    from vlm_jax.nn import functional

    if config["system"] != args.system:
        raise ValueError(
            f"{args.source} is a run of the system {config['system']!r}, not {args.system!r}"
        )
    module = task_lib.resolve(args.system, "systems")
    task = module.make_task(config["model"], **config.get("task", {}))
    params = load()
    if args.system == "vqgan":  # a run may hold a discriminator and more besides
        params = vqgan.tokenizer_part(params)
    flat = functional.flatten(params)
    dtypes = sorted({x.dtype.name for x in flat.values()})
    read = f"{len(flat)} parameters, {read}, {', '.join(dtypes)}"
    return Weights(task.cfg, params, args.dtype or common_dtype(dtypes), read, source=source)


def _of_upstream(args: argparse.Namespace) -> Weights:
    from vlm_jax.weights import clip, convert, llama, readers, vqgan

    network = {"lvm": llama, "vqgan": vqgan, "clip": clip}[args.system]
    tensors = clip.read(args.source) if network is clip else readers.read(args.source)
    layout = network.layout_of(tensors)
    if args.preset and args.preset not in network.PRESETS:
        raise ValueError(f"no preset {args.preset!r}; there are {', '.join(network.PRESETS)}")
    cfg = network.PRESETS[args.preset] if args.preset else network.config_of(tensors, args.source)
    skipped = convert.ignored(tensors, network.ignorable(cfg))
    dtypes = _dtypes(tensors, skipped)
    dtype = args.dtype or common_dtype(dtypes)
    cfg = _stored_in(cfg, dtype)
    read = f"{len(tensors)} tensors, {layout} layout, {', '.join(dtypes)}"
    params = network.from_tensors(tensors, cfg)
    return Weights(cfg, params, dtype, read, skipped, tensors.source)


def _of_nxtp(args: argparse.Namespace) -> Weights:
    from vlm_jax.systems.nxtp import network
    from vlm_jax.systems.nxtp import weights as nxtp
    from vlm_jax.weights import convert

    tensors = nxtp.read(args.source, args.clip)
    sizes = pathlib.Path(args.llama).expanduser() / "params.json" if args.llama else ""
    decoder = nxtp.decoder_config_of(tensors, sizes)
    cfg = network.NxtpConfig(nxtp.vision_config_of(tensors), decoder)
    skipped = convert.ignored(tensors, nxtp.IGNORED)
    dtypes = _dtypes(tensors, skipped)
    dtype = args.dtype or common_dtype(dtypes)
    cfg = _stored_in(cfg, dtype)
    params = nxtp.from_tensors(tensors, network.make(cfg).abstract())
    read = f"{len(tensors)} tensors, upstream layout, {', '.join(dtypes)}"
    return Weights(cfg, params, dtype, read, skipped, tensors.source)


def _dtypes(tensors: Mapping[str, Any], skipped: Sequence[str]) -> list[str]:
    return sorted({tensors[name].dtype.name for name in tensors if name not in skipped})


def _stored_in(cfg: Any, dtype: str) -> Any:
    """The config, or its halves, with that param_dtype."""
    halves = {
        field.name: _stored_in(value, dtype)
        for field in dataclasses.fields(cfg)
        if dataclasses.is_dataclass(value := getattr(cfg, field.name))
    }
    return dataclasses.replace(cfg, **(halves or {"param_dtype": dtype}))


# ---- writing ---------------------------------------------------------------------------------


def _write(args: argparse.Namespace, weights: Weights) -> tuple[int, dict[str, str]]:
    """Writes it; (number of tensors, file name -> sha256)."""
    from vlm_jax.systems.nxtp import weights as nxtp
    from vlm_jax.weights import clip, export, llama, vqgan

    network = {"lvm": llama, "vqgan": vqgan, "clip": clip, "nxtp": nxtp}[args.system]
    cfg, params, dtype = weights.cfg, weights.params, weights.dtype
    if args.format == "native":
        checkpoint = export.native(args.system, params, cfg, dtype)
    elif args.format == "hf":
        ids = {f"{key}_token_id": getattr(args, key) for key in ("bos", "eos")}
        ids = {key: value for key, value in ids.items() if value is not None}
        checkpoint = export.hf(network, params, cfg, dtype, **ids)
    elif args.system == "clip":
        checkpoint = clip.openai_checkpoint(params, dtype)
        return len(checkpoint.shapes), export.write_file(args.target, checkpoint)
    else:
        if "blocks" not in params["vision"]:
            raise ValueError(
                "the reference has CLIP's tower; a run with another has no such layout"
            )
        digests = nxtp.save(args.target, params, released=args.released, dtype=dtype)
        return len(nxtp.to_upstream(params, released=args.released)), digests
    return len(checkpoint.shapes), export.write(args.target, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
