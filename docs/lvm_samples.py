"""Makes docs/lvm_samples.png, the picture of the README, from a run of configs/lvm_3b.py:tiny.

    python docs/lvm_samples.py runs/lvm docs/lvm_samples.png

The photos are those that may be shown (third_party/NOTICE.md): a window moves over them, or they
turn from grey to colour. Training never saw "cup" (coffee.png); it saw other windows of the others.
Everything is drawn as the tokenizer sees it.
"""

import sys

import numpy as np

import vlm_jax
from vlm_jax.data import images
from vlm_jax.datasets import demo_photos
from vlm_jax.systems.lvm import format as layouts

SHOWN = {"cup": "coffee.png", "cat": "chelsea.png", "rocket": "rocket.jpg",
         "astronaut": "astronaut.png"}  # fmt: skip


def main(run, out):
    model = vlm_jax.load("lvm", run)
    rng = np.random.default_rng(4)
    photos = {p["name"]: p["image_u8"] for p in demo_photos.load_large("all") if p["name"] in SHOWN}
    total = model.context_images
    sentences = {}
    for name in SHOWN:
        sentences[f"window over {name}"] = layouts.pan(photos[name], rng, num_images=total)
    names = [name for name in SHOWN if name != "cup"] + ["cup"]
    crops = [images.random_crop(photos[name], rng, min_side=200) for name in names]
    sentences["grey to colour"] = layouts.colorization(crops)[-total:]
    made = model.continue_([sentence[:-1] for sentence in sentences.values()], seed=1)
    rows = []
    for sentence, new in zip(sentences.values(), made):
        seen = model.tokenizer.decode_u8(model.tokenizer.encode_u8(sentence))
        rows.append([*seen[:-1], new[0, 0], seen[-1]])
    columns = [f"context {i + 1}" for i in range(total - 1)] + ["generated", "true"]
    sheet = images.draw_grid(rows, column_labels=columns, row_labels=list(sentences), cell=96)
    with open(out, "wb") as file:
        file.write(images.encode(sheet))


if __name__ == "__main__":
    main(*sys.argv[1:])
