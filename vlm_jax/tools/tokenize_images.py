r"""Turns folders of images, pairs, videos and annotations into token files of visual sentences.

    python -m vlm_jax.tools.tokenize_images --layout=video --stride=8,24 --input=clips \
        --tokenizer=vqgan_f16 --out=tokens/clips
    python -m vlm_jax.tools.tokenize_images --layout=pairs --input=photos --annotations=depth \
        --epochs=5 --tokenizer=vqgan_f16 --out=tokens/depth --format=jsonl
    python -m vlm_jax.tools.tokenize_images --preview=look.png --tokens=tokens/depth/*.jsonl \
        --tokenizer=vqgan_f16

The layouts and their options: vlm_jax/systems/lvm/README.md. Killed, start it again with the same
arguments: complete shards are kept. Several processes, also on several machines with a common
--out, share the shards (--num_processes and --process_id, or SLURM's and MPI's environment);
they do not talk to each other. One process drives one accelerator.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import os
import pathlib
import sys
from collections.abc import Sequence

from vlm_jax.data import inputs
from vlm_jax.machines import console, disk

processes = inputs.processes


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    console.tolerate_any_text()
    args = _parser().parse_args(argv)
    try:
        if not args.layout and not args.preview:
            raise ValueError("nothing to do: give --layout, or --preview of existing shards")
        made = _tokenize(args) if args.layout else None
        if args.preview:
            _preview(args, made or _tokens(args))
    except (ValueError, OSError, ImportError) as error:
        print(f"tokenize_images: {disk.explain(error, args.out)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntokenize_images: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenize_images", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    numbers = _list_of(int)
    add = parser.add_argument
    add(
        "--layout",
        default="",
        help="kind of sentence: single, video, frames, rotation, category,"
        "\npairs, colorization, inpainting, multi, annotated_video, co3d",
    )
    add("--input", default="", help="folder of images or videos, searched at any depth")
    add(
        "--annotations",
        type=_list_of(str),
        default=(),
        help="folders that match --input, or FILE.json:boxes|masks|keypoints|openpose\n"
        "[:black|:image]; several with commas. co3d: names of sub-folders",
    )
    add("--match", default="stem", help="folders match by stem, or by order alone")
    add("--images", type=int, default=0, help="of a sentence; default 16")
    add(
        "--stride",
        type=numbers,
        default=(),
        help="frames (8) or views (1) between images;\nseveral with commas are so many passes",
    )
    add("--max_stride", type=int, default=4, help="of frame folders: 1 to this, at random")
    add("--per_class", type=numbers, default=(4,), help="category: images of a class in a row")
    add("--shots", type=int, default=3, help="multi: images of a sentence")
    add("--elements", type=int, default=0, help="multi: so many of image and annotations; 0 all")
    add("--frames", type=int, default=0, help="of a clip (16), of a co3d object (4)")
    add("--clips", type=int, default=0, help="of a sentence (2), co3d objects of a sentence (4)")
    add("--order", default="both", help="annotated_video: blocks, interleaved or both")
    add("--epochs", type=int, default=1, help="passes over the data, each grouped anew")
    add("--sentences", type=int, default=0, help="exactly so many, instead of epochs")
    add("--seed", type=int, default=0)
    add("--tokenizer", required=True, help="tiny, or a folder with config.json and weights")
    add("--side", type=int, default=0, help="pixels of an image; 0: as the tokenizer was trained")
    add("--codebook_size", type=int, default=0, help="stop unless the tokenizer has it")
    add("--tokens_per_image", type=int, default=0, help="stop unless the tokenizer has it")
    add("--out", default="", help="folder of the shards")
    add("--name", default="", help="of the shards and the source; default: the layout")
    add("--format", default="array_record", choices=("array_record", "jsonl"))
    add("--shards", type=int, default=0, help="0: one for every 16,384 images")
    add("--shard", type=int, default=-1, help="make this one only")
    add("--num_processes", type=int, default=0, help="that share the shards")
    add("--process_id", type=int, default=-1, help="from 0")
    add("--batch", type=int, default=64, help="images on the device at once")
    add("--threads", type=int, default=min(32, 2 * (os.cpu_count() or 4)), help="that read images")
    add("--max_bad_fraction", type=float, default=0.01, help="of the files; more stop the run")
    add("--preview", default="", help="write this picture of decoded sentences")
    add("--preview_rows", type=int, default=8, help="sentences in it")
    add("--tokens", default="", help="files to preview, also upstream's; default: those of --out")
    return parser


def _list_of(kind):
    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(",") if part)

    parse.__name__ = f"list of {kind.__name__}"  # argparse puts it into its message
    return parse


def _tokenize(args: argparse.Namespace) -> list[str]:
    """Writes this process's shards; returns their paths."""
    from vlm_jax.data import records
    from vlm_jax.systems.lvm import sentences

    for name in ("input", "out"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing")
    if args.shards < 0 or args.batch < 1 or args.threads < 1:
        raise ValueError("--shards, --batch and --threads cannot be so small")
    name = args.name or args.layout
    if name != os.path.basename(name) or name.startswith("."):
        raise ValueError(f"--name={name} is not the name of files in --out")
    count, rank = inputs.processes(args.num_processes, args.process_id)
    fields = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(sentences.Options)
    }
    plan = sentences.make(sentences.Options(**fields))
    for note in plan.notes:
        print(f"[tokenize] {note}", file=sys.stderr)
    folder = pathlib.Path(args.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder}: cannot be written to")

    # Host work before this line, so that a mistake shows before weights are read.
    from vlm_jax.data import pictures
    from vlm_jax.encoders import image_tokenizer
    from vlm_jax.systems.lvm import token_files
    from vlm_jax.tools import token_shards

    shards = args.shards or -(-plan.count * plan.images // token_shards.IMAGES_PER_SHARD)
    if shards > plan.count:
        raise records.DataError(f"--shards={shards} of {plan.count} sentences: some would be empty")
    if args.shard >= shards:
        raise records.DataError(f"--shard={args.shard} is not below --shards={shards}")
    tokenizer = image_tokenizer.ImageTokenizer.load(
        args.tokenizer,
        side=args.side,
        codebook_size=args.codebook_size,
        tokens_per_image=args.tokens_per_image,
        max_batch=args.batch,
    )
    token_shards.check_manifest(
        folder,
        {
            **fields,
            "files": plan.files,
            "files_sha256": plan.digest,
            "name": name,
            "format": args.format,
            "shards": shards,
            "sentences_in_all": plan.count,
            "batch": args.batch,
            "tokenizer_sha256": token_files.digest(tokenizer),
            "tokenizer_config": dataclasses.asdict(tokenizer.cfg),
        },
    )
    job = token_shards.Job(
        plan,
        pictures.Reader(tokenizer.side, plan.drawings),
        tokenizer,
        folder,
        name,
        args.format,
        shards,
        args.threads,
        args.max_bad_fraction,
    )
    mine = [args.shard] if args.shard >= 0 else list(range(rank, shards, count))
    made = token_shards.write(job, mine)
    print(
        f"[tokenize] {made['sentences']} sentences, {made['images']} different images of "
        f"{plan.files} files; {made['failures']} sentences left out; {len(mine)} of {shards} "
        f"shards, {made['kept']} of them were there: {folder}",
        file=sys.stderr,
    )
    return [str(job.path(shard)) for shard in mine]


def _tokens(args: argparse.Namespace) -> list[str]:
    """The files to preview."""
    folder = glob.escape(os.path.expanduser(args.out))
    pattern = os.path.expanduser(args.tokens) or os.path.join(folder, "*.array_record")
    found = sorted(glob.glob(pattern))
    if not found and args.out and not args.tokens:
        found = sorted(glob.glob(os.path.join(folder, "*.jsonl")))
    if not found:
        raise ValueError(f"no token files to preview: {pattern} (--tokens, or --out)")
    return found


def _preview(args: argparse.Namespace, paths: Sequence[str]) -> None:
    from vlm_jax.encoders import image_tokenizer
    from vlm_jax.tools import token_preview

    tokenizer = image_tokenizer.ImageTokenizer.load(
        args.tokenizer,
        side=args.side,
        codebook_size=args.codebook_size,
        tokens_per_image=args.tokens_per_image,
        max_batch=args.batch,
    )
    rows = token_preview.write(args.preview, paths, tokenizer, args.preview_rows)
    print(f"[tokenize] {rows} sentences: {args.preview}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
