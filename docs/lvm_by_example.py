"""Makes docs/lvm_by_example.png with the model that ships in the package.

    python docs/lvm_by_example.py docs/lvm_by_example.png

Scenes are made of what may be shown (third_party/NOTICE.md) and training never had: eight coins, as
they are or filled with pieces of the photo of a cup, on pieces of that photo or of the right halves
of three textures. The first scenes of seed 0, none chosen.
"""

import sys

import numpy as np

import vlm_jax
from vlm_jax.data import images
from vlm_jax.datasets import composed_scenes, demo_photos, demo_scenes

SIDE, ROWS = 32, 5
GROUNDS = ("brick", "grass", "gravel")  # the moon's licence is not stated
ASKED = {"mask": "mark the thing", "colour": "colour as in the examples"}


def main(out):
    model = vlm_jax.load("lvm", "tiny")
    scenes = composed_scenes.Scenes("heldout", side=SIDE, chunk=ROWS, bank=bank())
    rows, captions = [], []
    for kind, caption in ASKED.items():
        (sentences,) = scenes.draw(kind, ROWS)
        pairs = [list(zip(sentence[:-2:2], sentence[1:-2:2])) for sentence in sentences]
        made = model.analogy(pairs, [sentence[-2] for sentence in sentences], temperature=0)
        rows += [[*s[:-1], new[0, 0], s[-1]] for s, new in zip(sentences, made)]
        captions += [caption] * ROWS
    columns = [f"{what} {i + 1}" for i in range(3) for what in ("example", "answer")]
    columns += ["query", "generated", "true"]
    sheet = images.draw_grid(rows, column_labels=columns, row_labels=captions, cell=96)
    with open(out, "wb") as file:
        file.write(images.encode(sheet))


def bank():
    rng = np.random.default_rng(0)
    (cup,) = [p["image_u8"] for p in demo_photos.load_large("all") if p["name"] == "cup"]
    coins = [thing for thing in demo_scenes.cutouts("heldout") if thing[0] == "coin"]
    grounds = [demo_scenes.texture("heldout", 64, rng, GROUNDS) for _ in range(200)]
    pieces = [images.random_crop(cup, rng, min_side=100) for _ in range(100)]
    return composed_scenes.bank_of_things(coins) | {
        "grounds": np.stack(grounds),
        "photos": np.stack([images.resize(piece, 64) for piece in pieces]),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
