"""LVM: continue images, or complete an analogy.

    --continue a.png b.png c.png --n=2        the two images that follow
    --pair a.png a2.png --pair b.png b2.png --query=c.png

Writes OUT/grid.png (prompt and candidates) and every new image as OUT/candidate_I_frame_J.png.
"""

from __future__ import annotations

import pathlib

from vlm_jax import loading
from vlm_jax.data import images


def add_arguments(parser):
    """Adds the arguments of this system."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--continue", dest="frames", nargs="+", metavar="IMAGE")
    what.add_argument("--pair", action="append", nargs=2, metavar="IMAGE")
    parser.add_argument("--query", metavar="IMAGE", help="with --pair")
    parser.add_argument("--n", type=int, default=1, help="new images")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="", help='"tiny" or a folder with the VQGAN')


def predict(args):
    """Loads, generates, writes the pictures, prints where they are."""
    if bool(args.pair) != bool(args.query):
        raise ValueError("--pair and --query belong together")
    # Decoded before the model is loaded: a wrong file should fail at once.
    paths = args.frames or [path for pair in args.pair for path in pair] + [args.query]
    prompt = [images.decode(path) for path in paths]
    fields = {"tokenizer": args.tokenizer} if args.tokenizer else {}
    model = loading.load("lvm", args.checkpoint, **fields)
    made = model.continue_(
        prompt,
        args.n,
        candidates=args.candidates,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for i, candidate in enumerate(made):
        for j, image in enumerate(candidate):
            (out / f"candidate_{i}_frame_{j}.png").write_bytes(images.encode(image))
    shown = [images.resize(image, model.tokenizer.side) for image in prompt]
    names = [pathlib.Path(path).name for path in paths] + [f"new {j + 1}" for j in range(args.n)]
    grid = images.draw_grid(
        [[*shown, *candidate] for candidate in made],
        column_labels=names,
        row_labels=[f"candidate {i}" for i in range(len(made))],
    )
    (out / "grid.png").write_bytes(images.encode(grid))
    print(f"wrote {out / 'grid.png'} and {made.shape[0] * made.shape[1]} images")
