"""LVM: continue images, complete an analogy, or answer a file of prompts.

    --continue a.png b.png c.png --n=2        the two images that follow
    --continue clip.mp4 --clip_stride=8       the image that follows frames 0, 8, 16, 24
    --pair a.png a2.png --pair b.png b2.png --query=c.png
    --jsonl=prompts.jsonl --candidates=2 --resize_output=original

Writes OUT/grid.png (prompt and candidates) and every new image as OUT/candidate_I_frame_J.png.
Images that do not fit into the context are marked in the grid.

--jsonl is the batch interface of the reference: a line is {"input": [paths], "output": path,
"target": [paths]}, the target optional; relative inputs are taken from the folder of the file.
Writes OUT/output per line, candidates below each other and new images side by side, and prints the
error against the targets. Lines may differ in their number of images. The same command run again
after it was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import pathlib

import numpy as np

from vlm_jax import loading
from vlm_jax.data import folders, images, records, results, tiling, video
from vlm_jax.datasets import visual_prompts
from vlm_jax.systems.lvm import model as model_lib

_CHUNK = 64  # prompts in memory at once; the device takes fewer
_FIELDS = ("tokenizer", "context_images", "preset", "dtype")  # of the weights

EXAMPLE = "--continue a.png b.png"  # what a finished run suggests


def add_arguments(parser):
    """Adds the arguments of this system."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--continue", dest="frames", nargs="+", action="extend", metavar="IMAGE", help="see above"
    )
    what.add_argument("--pair", action="append", nargs=2, metavar="IMAGE", help="see above")
    what.add_argument("--jsonl", metavar="FILE", help="see above")
    add = parser.add_argument
    add("--query", metavar="IMAGE", help="with --pair")
    add("--clip_start", type=int, default=0, help="first frame of a video")
    add("--clip_stride", type=int, default=8, help="frames between two of them")
    add("--clip_frames", type=int, default=4, help="frames of a video, at most")
    add("--n", type=int, default=1, help="new images")
    add("--candidates", type=int, default=4, help="independent answers")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top_k", type=int, default=model_lib.REFERENCE_TOP_K, help="likeliest ids; 0 is all")
    add("--top_p", type=float, default=1.0, help="share of probability to draw from; 1 is all")
    add("--seed", type=int, default=0, help="equal seeds give equal images")
    help_ = "of new images: empty, 'original' (size of the last input) or 'WIDTH,HEIGHT'"
    add("--resize_output", default="", help=help_)
    help_ = "with --jsonl: put the inputs in front of the new images"
    add("--show_inputs", action="store_true", help=help_)
    help_ = "with --jsonl: allow outputs outside of --out"
    add("--anywhere", action="store_true", help=help_)
    add("--tokenizer", default="", help='"tiny" or a folder with the VQGAN; empty: the run\'s own')
    help_ = "images of a sequence, the new ones included; 0: as trained"
    add("--context_images", type=int, default=0, help=help_)
    add("--preset", default="", help="sizes of weights without a config.json, such as lvm_7b")
    add("--dtype", default="", help="empty: bfloat16 on an accelerator, float32 on a CPU")


def predict(args):
    """Loads, generates, writes the pictures, prints where they are."""
    if bool(args.pair) != bool(args.query):
        raise ValueError("--pair and --query belong together")
    if args.jsonl:
        _predict_file(args)
        return
    tiling.output_size(args.resize_output, (1, 1))
    # Decoded before the model is loaded: a wrong file should fail at once.
    paths = args.frames or [path for pair in args.pair for path in pair] + [args.query]
    prompt, names = _read(paths, args)
    out = pathlib.Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file; give a folder")
    model = _load(args)
    unused = model.dropped(len(prompt), pairs=bool(args.pair))
    made = _continue(model, prompt[unused:], args, args.seed)
    size = tiling.output_size(args.resize_output, prompt[-1].shape[:2]) or made.shape[2:4]
    made = [[images.resize(image, size) for image in candidate] for candidate in made]
    out.mkdir(parents=True, exist_ok=True)
    for i, candidate in enumerate(made):
        for j, image in enumerate(candidate):
            (out / f"candidate_{i}_frame_{j}.png").write_bytes(images.encode(image))
    names = [f"not used: {name}" if i < unused else name for i, name in enumerate(names)]
    grid = images.draw_grid(
        [[*prompt, *candidate] for candidate in made],
        column_labels=[*names, *(f"new {j + 1}" for j in range(args.n))],
        row_labels=[f"candidate {i}" for i in range(len(made))],
    )
    (out / "grid.png").write_bytes(images.encode(grid))
    print(f"wrote {out / 'grid.png'} and {len(made) * args.n} images")
    if unused:
        print(f"the first {unused} of {len(prompt)} images do not fit into the context: not used")


def _read(paths, args):
    """The prompt's images and their names; of a video some frames."""
    prompt, names = [], []
    for path in paths:
        name = pathlib.Path(path).name
        if not name.lower().endswith(folders.VIDEOS):
            prompt.append(images.as_image(path))
            names.append(name)
            continue
        if args.pair:
            raise ValueError(f"{path}: a pair is of images; --continue takes videos")
        start, stride = args.clip_start, args.clip_stride
        if min(start, stride - 1, args.clip_frames - 1) < 0:
            raise ValueError("--clip_start, --clip_stride and --clip_frames cannot be so small")
        frames_u8 = video.read_frames(path, start=start, stride=stride, count=args.clip_frames)
        prompt.extend(frames_u8)
        names.extend(f"{name} {start + i * stride}" for i in range(len(frames_u8)))
    return prompt, names


def _predict_file(args):
    """Every line of a batch file; a line whose pictures are damaged is named and left out.

    Raises:
      DataError: the file or an output is wrong, or, after all others are written, damaged pictures.
    """
    source = visual_prompts.VisualPrompts(args.jsonl, output=True)
    paths = [
        tiling.place(args.out, source.record_id(i), anywhere=args.anywhere)
        for i in range(len(source))
    ]
    tiling.output_size(args.resize_output, (1, 1))
    model = _load(args)
    state = results.Results(
        pathlib.Path(args.out) / ".unfinished.jsonl", _settings(args), start_anew=True
    )
    done = {row["id"]: row for row in state.rows()}
    if done:
        print(f"{len(done)} of {len(source)} lines are there from last time")
    bad = []
    for start in range(0, len(source), _CHUNK):
        lines = []
        for i in range(start, min(start + _CHUNK, len(source))):
            name = source.record_id(i)
            try:
                lines += [] if name in done else [(name, paths[i], source[i])]
            except records.BadRecordError as error:
                bad.append(f"{name}: {error}")
        new = _answer(model, lines, args, args.seed + start) if lines else []
        state.write(new)
        done |= {row["id"]: row for row in new}
    state.discard()
    print(f"wrote {len(source) - len(bad)} pictures into {args.out}")
    _summarise(list(done.values()))
    if bad:
        shown = "\n".join(bad[:8]) + (f"\nand {len(bad) - 8} more" if len(bad) > 8 else "")
        raise records.DataError(f"{len(bad)} of {len(source)} lines were left out:\n{shown}")


def _answer(model, lines, args, seed):
    """Writes the pictures of lines [(name, path, record)]; a row of what is known of each."""
    unused = [model.dropped(len(record["prompt"])) for *_, record in lines]
    prompts = [record["prompt"][count:] for (*_, record), count in zip(lines, unused)]
    made = _continue(model, prompts, args, seed)
    rows = []
    for (name, path, record), count, candidates_u8 in zip(lines, unused, made):
        mse = _save(path, record, count, candidates_u8, args, model.tokenizer.side)
        rows.append({"id": name, "mse": mse, "unused": count})
    return rows


def _summarise(rows):
    """Prints the error, and whether all images were used."""
    if known := [row["mse"] for row in rows if row["mse"] is not None]:
        mse = float(np.mean(known))
        print(f"mse {mse:.5f} over {len(known)} lines ({3 * mse:.5f} as the reference prints it)")
    if cut := sum(row["unused"] > 0 for row in rows):
        print(
            f"{cut} of {len(rows)} lines have more images than fit into the context: their first "
            f"ones are not used (faded where --show_inputs shows them)"
        )


def _save(path, record, unused, candidates_u8, args, side):
    """Writes the picture of a line; its error against the target, None without one."""
    prompt = record["prompt"]
    size = tiling.output_size(args.resize_output, prompt[-1].shape[:2])
    inputs = [_faded(x) for x in prompt[:unused]] + prompt[unused:] if args.show_inputs else []
    tiling.save(path, tiling.draw(candidates_u8, inputs, size))
    if len(record["target"]) != args.n:
        return None
    true = np.stack([images.resize(x, side) for x in record["target"]])
    return float(np.square(images.to01(candidates_u8) - images.to01(true)).mean())


def _faded(image_u8):
    return 192 + image_u8 // 4


def _settings(args):
    """What the pictures of a batch file depend on."""
    content = pathlib.Path(args.jsonl).expanduser().read_bytes()
    fields = {name: value for name, value in vars(args).items() if name != "out"}
    return {**fields, "sha256": hashlib.sha256(content).hexdigest()}


def _load(args):
    fields = {name: getattr(args, name) for name in _FIELDS}
    given = {name: value for name, value in fields.items() if value}
    return loading.load("lvm", args.checkpoint, averaged=args.averaged, **given)


def _continue(model, prompts, args, seed):
    return model.continue_(
        prompts,
        args.n,
        candidates=args.candidates,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=seed,
    )
