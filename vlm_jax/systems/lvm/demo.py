"""Token files of the CPU-sized recipes: real photos and video frames as visual sentences.

    kind     sentence                                        held out
    video    frames of one shot, stride 1 to 4               a shot, and the end of another
    pan      a window moving slowly over a photo             other photos
    colour   grey, colour, grey, colour, ...                 photos that training never shows
    group    images of one class, then of the next           the same photos

Writes WORKDIR/demo/{train,heldout}_KIND.array_record. Equal arguments give equal files.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from vlm_jax import image_tokenizer
from vlm_jax.data import records
from vlm_jax.datasets import demo_photos, demo_videos, visual_sentences
from vlm_jax.systems.lvm import layouts

KINDS = ("video", "pan", "colour", "group")
_MAX_STRIDE = 4  # frames; upstream draws 1...4 for frame folders
_MAX_PAN = 0.03  # of the window per frame: like the videos, most of a frame is in the next one


def prepare(
    workdir: pathlib.Path,
    *,
    tokenizer: str = "tiny",
    image_side: int = 0,
    images: int = 8,
    sentences: int = 800,
    heldout_sentences: int = 16,
    crops: int = 300,
    seed: int = 0,
) -> None:
    """Writes the token files, unless they are there from the same arguments.

    Args:
      workdir: of the run.
      tokenizer: "tiny" or a folder.
      image_side: pixels of an image; 0 is the side that the tokenizer was trained for.
      images: of a sentence.
      sentences, heldout_sentences: of every kind.
      crops: random crops of the large photos, besides the 450 small ones.
      seed: of crops, groupings and starts.

    Raises:
      DataError: the photos or videos cannot be had (offline, or changed).
    """
    folder = workdir / "demo"
    made_of = dict(
        tokenizer=tokenizer, image_side=image_side, images=images, sentences=sentences,
        heldout_sentences=heldout_sentences, crops=crops, seed=seed,
    )  # fmt: skip
    note = folder / "made_of.json"
    if note.exists() and json.loads(note.read_text()) == made_of:
        return
    encoder = image_tokenizer.ImageTokenizer.load(tokenizer, side=image_side, max_batch=64)
    for split, count in (("train", sentences), ("heldout", heldout_sentences)):
        rng = np.random.default_rng([seed, len(split)])
        # Crops stay out of the held-out split: its large photos are few.
        source = demo_photos.Photos(split, crops if split == "train" else 0, encoder.side, seed)
        photos = [source[i] for i in range(len(source))]
        shots = demo_videos.load_shots(split, encoder.side)
        small, large = demo_photos.load_tiny(split), demo_photos.load_large(split)
        for kind in KINDS:
            drawn = [_draw(kind, photos, small, large, shots, images, rng) for _ in range(count)]
            path = folder / f"{split}_{kind}.array_record"
            visual_sentences.write(path, _tokenize(drawn, encoder, kind))
    note.write_text(json.dumps(made_of))
    print(
        f"[lvm] tokenized {len(KINDS)} kinds of visual sentences, {sentences} to train on and "
        f"{heldout_sentences} held out of each, into {folder}",
        file=sys.stderr,
    )


def _draw(kind, photos, small, large, shots, num_images, rng) -> list[np.ndarray]:
    """The images of one random sentence."""
    if kind == "video":
        length = np.array([len(shot["frames_u8"]) for shot in shots], np.float64)
        shot = shots[int(rng.choice(len(shots), p=length / length.sum()))]
        stride = int(rng.integers(1, _MAX_STRIDE + 1))
        return layouts.video_clip(shot["frames_u8"], rng, num_images=num_images, stride=stride)
    if kind == "pan":
        # As many windows over large photos, which are few, as over small ones.
        album = large if rng.random() < 0.5 else small
        photo = album[int(rng.integers(len(album)))]
        return layouts.pan(photo["image_u8"], rng, num_images=num_images, max_step=_MAX_PAN)
    if kind == "colour":
        chosen = rng.choice(len(photos), num_images // 2, replace=False)
        return layouts.colorization([photos[i]["image_u8"] for i in chosen])
    by_class: dict[int, list[np.ndarray]] = {}
    for photo in photos:
        if photo["label"] >= 0:
            by_class.setdefault(photo["label"], []).append(photo["image_u8"])
    per_class = max(2, num_images // 4)
    return layouts.category_groups(by_class, rng, num_images=num_images, per_class=per_class)


def _tokenize(
    sentences: Iterable[list[np.ndarray]], encoder: image_tokenizer.ImageTokenizer, kind: str
) -> Iterator[visual_sentences.Sentence]:
    """Tokens of every sentence; an image that returns is encoded once."""
    sentences = list(sentences)
    place: dict[bytes, int] = {}
    distinct, numbers = [], []
    for sentence in sentences:
        row = []
        for image in sentence:
            key = hashlib.sha256(np.ascontiguousarray(image)).digest()
            if key not in place:
                place[key] = len(distinct)
                distinct.append(np.asarray(image))
            row.append(place[key])
        numbers.append(row)
    if not distinct:
        raise records.DataError(f"no sentence of kind {kind!r}")
    ids = encoder.encode_u8(distinct)
    for index, row in enumerate(numbers):
        yield visual_sentences.Sentence(
            tokens=ids[row].reshape(-1), num_images=len(row), id=f"{kind}:{index}", source=kind
        )
