"""Token files of the CPU-sized recipes: real photos and video frames as visual sentences.

    kind     sentence                                        held out
    video    frames of one shot, stride 1 to 4               a shot, and the end of another
    pan      a window moving slowly over a photo             other photos
    colour   grey, colour, grey, colour, ...                 photos that training never shows
    group    images of one class, then of the next           the same photos
    inpaint  photo with black holes, photo, ...              the same photos
    mask     scene, mask of the thing in it, ...             other things, other halves of textures

Writes WORKDIR/demo/{train,heldout}_KIND.array_record. Equal arguments give equal files.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vlm_jax import config, image_tokenizer
from vlm_jax.data import records
from vlm_jax.datasets import demo_photos, demo_scenes, demo_videos, few_shot, visual_sentences
from vlm_jax.systems.lvm import layouts

KINDS = ("video", "pan", "colour", "group", "inpaint", "mask")
_DEFAULT_KINDS = ("video", "pan", "colour", "group")
_MAX_STRIDE = 4  # frames; upstream draws 1...4 for frame folders
_MAX_PAN = 0.03  # of the window per frame: like the videos, most of a frame is in the next one


def prepare(
    workdir: pathlib.Path,
    *,
    tokenizer: str = "tiny",
    image_side: int = 0,
    images: int = 8,
    kinds: Sequence[str] = _DEFAULT_KINDS,
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
      kinds: which of the table above.
      sentences, heldout_sentences: of every kind.
      crops: random crops of the large photos, besides the 450 small ones.
      seed: of crops, groupings and starts.

    Raises:
      ConfigError: unknown kinds.
      DataError: the photos or videos cannot be had (offline, or changed).
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise config.ConfigError(f"prepare.kinds: {unknown} are none of {', '.join(KINDS)}")
    folder = workdir / "demo"
    made_of = dict(
        tokenizer=tokenizer, image_side=image_side, images=images, kinds=list(kinds),
        sentences=sentences, heldout_sentences=heldout_sentences, crops=crops, seed=seed,
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
        half = images // 2
        scenes = demo_scenes.Scenes(split, count=count * half, size=encoder.side, seed=seed)
        for kind in kinds:
            if kind == "mask":
                drawn = [_masks(scenes, range(i, i + half)) for i in range(0, count * half, half)]
            else:
                drawn = [
                    _draw(kind, photos, small, large, shots, images, rng) for _ in range(count)
                ]
            path = folder / f"{split}_{kind}.array_record"
            visual_sentences.write(path, _tokenize(drawn, encoder, kind))
    note.write_text(json.dumps(made_of))
    print(
        f"[lvm] tokenized {len(kinds)} kinds of visual sentences, {sentences} to train on and "
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
    if kind == "inpaint":
        chosen = rng.choice(len(photos), num_images // 2, replace=False)
        return layouts.inpainting([photos[i]["image_u8"] for i in chosen], rng)
    by_class: dict[int, list[np.ndarray]] = {}
    for photo in photos:
        if photo["label"] >= 0:
            by_class.setdefault(photo["label"], []).append(photo["image_u8"])
    per_class = 2  # few classes have four held-out photos
    return layouts.category_groups(by_class, rng, num_images=num_images, per_class=per_class)


def _masks(scenes, indices) -> list[np.ndarray]:
    """scene1 mask1 scene2 mask2 ...; masks are white on black."""
    drawn = [scenes[index] for index in indices]
    return layouts.pairs(
        [scene["image_u8"] for scene in drawn],
        [few_shot.paint(scene["masks"].any(axis=0)) for scene in drawn],
    )


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
