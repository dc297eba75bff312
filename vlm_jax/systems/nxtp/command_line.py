"""NXTP: name what is in photos.

    --image a.jpg b.jpg --k 20                               a run of our own
    --image a.jpg --clip ViT-L-14.pt --llama llama-2-7b      a released checkpoint
    --image PHOTOS --out labels.jsonl                        a folder, at any depth

--image takes files, URLs, folders, globs, @LIST (a path per line) and - (paths on standard input).
--out is a .jsonl (a line per photo), a .csv (a row per label) or a folder: OUT/labels.json (one
list), OUT/labels.png (the first photos with their labels), and with --attention one picture per
layer, OUT/NAME_attention_layer_L.png: for every head and place of the image, what it reads.

The same command run again goes on where it stopped; a folder that is complete is made anew. Photos
that cannot be read are listed in OUT.failed and do not stop the others; the exit status is 1 when
there was no other. Several processes (--num_processes and --process_id, or SLURM's and MPI's
environment) share the photos and write a file each.
"""

from __future__ import annotations

import itertools
import json
import pathlib

from vlm_jax import loading
from vlm_jax.data import images, inputs, records, results, streaming
from vlm_jax.systems.nxtp import label_sheet
from vlm_jax.systems.nxtp import model as model_lib

_SHOWN = 60  # photos on the sheet
_PRINTED = 20  # photos whose labels are printed
_COLUMNS = ("id", "rank", "label", "score")
_OPTIONS = ("k", "max_tokens", "ranking", "unfinished", "threshold", "prompt")
_FIELDS = ("clip", "llama", "tokenizer", "dtype")  # of the weights

EXAMPLE = "--image photo.jpg"  # what a finished run suggests


def add_arguments(parser):
    """Adds the arguments of this system."""
    add = parser.add_argument
    add("--image", nargs="+", action="extend", required=True, metavar="INPUT", help="see above")
    add("--k", type=int, default=20, help="labels per photo, before merging")
    add("--max_tokens", type=int, default=model_lib.MAX_TOKENS, help="of a label")
    add("--ranking", default="prob", choices=model_lib.RANKINGS, help="what sorts the labels")
    add("--threshold", type=float, default=0.0, help="leave out labels of a lower score")
    help_ = "also list labels that were cut off at --max_tokens"
    add("--unfinished", action="store_true", help=help_)
    add("--prompt", default="", help="what the labels follow; empty: the model's own")
    add("--batch_size", type=int, default=model_lib.MAX_IMAGES, help="photos per device call")
    add("--threads", type=int, default=streaming.THREADS, help="that read and cut photos")
    add("--num_processes", type=int, default=0, help="that share the photos")
    add("--process_id", type=int, default=-1, help="from 0")
    add("--clip", default="", help="the CLIP file of a released checkpoint")
    add("--llama", default="", help="folder with params.json and tokenizer.model")
    add("--tokenizer", default="", help="tokenizer file, when it lies elsewhere")
    add("--dtype", default="", help="empty: bfloat16 on an accelerator, float32 on a CPU")
    add("--attention", action="store_true", help="draw attention maps as well, into a folder")


def predict(args) -> int:
    """Loads, labels, writes, prints; returns the exit status."""
    out = pathlib.Path(args.out)
    is_folder = out.suffix.lower() not in (".jsonl", ".csv")
    if out.suffix.lower() in (".json", ".txt", ".tsv", ".png") and not out.is_dir():
        raise ValueError(f"--out={args.out}: give a name that ends in .jsonl or .csv, or a folder")
    if args.attention and not is_folder:
        raise ValueError(f"--attention draws pictures; --out={args.out} must be a folder")
    fields = {name: getattr(args, name) for name in _FIELDS}
    given = {"averaged": args.averaged, **{name: x for name, x in fields.items() if x}}
    model = loading.load("nxtp", args.checkpoint, **given)
    count, rank = inputs.processes(args.num_processes, args.process_id)
    names = inputs.find(args.image)[rank::count]
    options = {name: getattr(args, name) for name in _OPTIONS}
    file = results.of_process(out / "labels.jsonl" if is_folder else out, count, rank)
    made = results.Results(file, {"checkpoint": args.checkpoint, **given, **options}, _COLUMNS)

    def label(todo):
        flow = dict(batch_size=args.batch_size, threads=args.threads, on_error="yield")
        return model.label_stream(todo, **flow, **options)

    status = results.run(names, made, label, _rows_of(made), batch_size=args.batch_size)
    if is_folder:
        _write_folder(made, model if args.attention else None, args.k)
    _print(made)
    if is_folder:
        made.discard()
    print(f"wrote {file.with_suffix('.json') if is_folder else file}")
    return status


def _rows_of(made):
    def lines(name, labels):
        return [{"id": name, "labels": [[label, round(score, 6)] for label, score in labels]}]

    def rows(name, labels):
        ranked = enumerate(labels or [("", 0.0)], 1)  # a photo without labels is done as well
        return [
            {"id": name, "rank": rank, "label": label, "score": round(score, 6)}
            for rank, (label, score) in ranked
        ]

    return rows if made.is_csv else lines


def _write_folder(made, model, shown):
    """The .json, the sheet, and with a model the attention maps."""
    _write_json(made)
    entries, names = [], inputs.output_names(sorted(made.done))
    for row in made.rows() if model else itertools.islice(made.rows(), _SHOWN):
        try:
            photo = images.as_image(row["id"])
        except images.ImageError:  # gone since
            continue
        if len(entries) < _SHOWN:
            labels = [(label, score) for label, score in row["labels"]]
            entries.append(label_sheet.Entry(label_sheet.thumbnail(photo), labels))
        if model:
            _draw_attention(model, photo, made.path.parent / names[row["id"]])
    if entries:
        sheet = label_sheet.draw(entries, shown=shown)
        made.path.with_suffix(".png").write_bytes(images.encode(sheet))
        print(f"{made.path.with_suffix('.png').name} shows {len(entries)} of {len(made)} photos")


def _write_json(made):
    """All of it as one list, written row by row."""
    with open(made.path.with_suffix(".json"), "w", **records.TEXT) as stream:
        stream.write("[")
        for number, row in enumerate(made.rows()):
            entry = {"image": row["id"], "labels": row["labels"]}
            text = json.dumps(entry, indent=1, ensure_ascii=False)
            stream.write(("," if number else "") + "\n" + text)
        stream.write("\n]\n")


def _draw_attention(model, photo, place):
    place.parent.mkdir(parents=True, exist_ok=True)
    for layer, maps_nts in enumerate(model.attention(photo)):
        sheet = model_lib.attention_sheet(maps_nts, model.cfg.num_image)
        file = place.with_name(f"{place.name}_attention_layer_{layer}.png")
        file.write_bytes(images.encode(sheet))


def _print(made):
    """The first photos; last of all, so that what fails here costs no result."""
    for number, (name, rows) in enumerate(itertools.groupby(made.rows(), lambda row: row["id"])):
        if number == _PRINTED:
            print(f"... and {len(made) - number} more photos")
            break
        print(name)
        for row in rows:
            for label, score in row.get("labels") or [(row.get("label"), row.get("score", 0))]:
                print(f"  {float(score):.5f}  {label}")
