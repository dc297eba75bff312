"""NXTP: name what is in photos.

    --image a.jpg b.jpg --k 20                               a run of our own
    --image a.jpg --clip ViT-L-14.pt --llama llama-2-7b      a released checkpoint

Prints the ranked labels; writes OUT/labels.json and OUT/labels.png, photos with their labels, and
with --attention one picture per layer, OUT/NAME_attention_layer_L.png: for every head and place of
the image, a map of what it reads.
"""

from __future__ import annotations

import json
import pathlib

from vlm_jax import loading
from vlm_jax.data import images, label_sheet, records
from vlm_jax.systems.nxtp import model as model_lib


def add_arguments(parser):
    """Adds the arguments of this system."""
    parser.add_argument("--image", nargs="+", required=True, metavar="IMAGE")
    parser.add_argument("--k", type=int, default=20, help="labels per photo, before merging")
    parser.add_argument("--clip", default="", help="the CLIP file of a released checkpoint")
    parser.add_argument("--llama", default="", help="folder with params.json and tokenizer.model")
    parser.add_argument("--tokenizer", default="", help="tokenizer file, when it lies elsewhere")
    parser.add_argument("--attention", action="store_true", help="draw attention maps as well")


def predict(args):
    """Loads, labels, prints and writes."""
    # Decoded before the model is loaded: a wrong file should fail at once.
    photos = [images.as_image(path) for path in args.image]
    given = {name: getattr(args, name) for name in ("clip", "llama", "tokenizer")}
    fields = {name: value for name, value in given.items() if value}
    model = loading.load("nxtp", args.checkpoint, **fields)
    found = model.label(photos, k=args.k)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    content = [
        {"image": str(path), "labels": [[label, round(score, 6)] for label, score in labels]}
        for path, labels in zip(args.image, found)
    ]
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (out / "labels.json").write_text(text + "\n", **records.TEXT)
    entries = [label_sheet.Entry(photo, labels) for photo, labels in zip(photos, found)]
    sheet = label_sheet.draw(entries, shown=args.k)
    (out / "labels.png").write_bytes(images.encode(sheet))
    written = ["labels.json", "labels.png"]
    if args.attention:
        for path, photo in zip(args.image, photos):
            maps = model.attention(photo)
            for layer, maps_nts in enumerate(maps):
                name = f"{pathlib.Path(path).stem}_attention_layer_{layer}.png"
                sheet = model_lib.attention_sheet(maps_nts, model.cfg.num_image)
                (out / name).write_bytes(images.encode(sheet))
                written.append(name)
    for path, labels in zip(args.image, found):  # last: what fails here costs no result
        print(path)
        for label, score in labels:
            print(f"  {score:.5f}  {label}")
    print(f"wrote {', '.join(written)} to {out}")
