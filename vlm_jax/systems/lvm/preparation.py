"""Token files that a recipe makes itself, before it trains: WORKDIR/FOLDER/SPLIT_KIND.array_record.

FOLDER is "demo" for the photos and videos that come in wheels, "own" for somebody's own. Equal
arguments and files give equal token files; they are made anew when either changes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import records, sidecar
from vlm_jax.datasets import own_files, visual_sentences
from vlm_jax.encoders import image_tokenizer
from vlm_jax.program import config
from vlm_jax.systems.lvm import albums, token_files

_DEFAULT_KINDS = ("video", "pan", "colour", "group")
_OWN_KINDS = tuple(kind for kind in albums.KINDS if kind != "mask")

Load = Callable[[str, int], albums.Album]  # split, pixels of an image


def prepare(
    workdir: pathlib.Path,
    *,
    path: str = "",
    heldout: float = 0.2,
    most: int = 2_000,
    tokenizer: str = "tiny",
    image_side: int = 0,
    images: int = 8,
    kinds: Sequence[str] = (),
    sentences: int = 800,
    heldout_sentences: int = 16,
    crops: int = 300,
    seed: int = 0,
) -> None:
    """Writes the token files, unless they are there from the same arguments.

    Args:
      workdir: of the run.
      path: folder of photos and videos, see `datasets/own_files`; "" takes those of the wheels.
      heldout: share of the files of `path` that are held out.
      most: photos of `path` that are read, and a twentieth of it videos.
      tokenizer: "tiny" or a folder.
      image_side: pixels of an image; 0 is the side that the tokenizer was trained for.
      images: of a sentence.
      kinds: of sentences, see `albums`. Empty: video, pan, colour and group; of `path`, whatever
        it has enough files for.
      sentences: of every kind.
      heldout_sentences: of every kind.
      crops: random crops of the large photos of the wheels, besides the 450 small ones.
      seed: of crops, groupings and starts.

    Raises:
      ConfigError: unknown kinds.
      DataError: the files cannot be had, or are too few.
    """
    known = _OWN_KINDS if path else albums.KINDS
    if unknown := sorted(set(kinds) - set(known)):
        raise config.ConfigError(f"prepare.kinds: {unknown} are none of {', '.join(known)}")
    if images < 2:
        raise config.ConfigError(f"prepare.images={images} must be at least 2")
    counts = {"train": sentences, "heldout": heldout_sentences}
    made_of: dict[str, Any] = dict(
        tokenizer=tokenizer,
        image_side=image_side,
        images=images,
        kinds=list(kinds),
        sentences=sentences,
        heldout_sentences=heldout_sentences,
        seed=seed,
    )
    if path:
        listing = own_files.find(path)
        made_of |= dict(heldout=heldout, most=most, files=_digest(listing))
        load = functools.partial(_own, listing, heldout, most, images)
    else:
        made_of |= dict(crops=crops)

        def load(split, side):
            return albums.demo(split, side, counts[split] * (images // 2), crops, seed)

    folder = workdir / ("own" if path else "demo")
    note = folder / "made_of.json"
    if note.is_file() and note.read_bytes() == _note(made_of):
        return
    note.unlink(missing_ok=True)
    for file in folder.glob("*.array_record"):
        file.unlink()  # of other arguments
    kinds = tuple(kinds) or (() if path else _DEFAULT_KINDS)
    made = _write(folder, load, tokenizer, image_side, images, counts, kinds, seed)
    partial = note.with_name(f".{note.name}.{os.getpid()}")
    partial.write_bytes(_note(made_of))
    os.replace(partial, note)
    print(
        f"[lvm] tokenized visual sentences ({', '.join(made)}), {sentences} to train on and "
        f"{heldout_sentences} held out of each kind, into {folder}",
        file=sys.stderr,
    )


def _note(made_of: Mapping[str, Any]) -> bytes:
    return json.dumps(made_of).encode()


def _write(folder, load: Load, tokenizer, side, images, counts, kinds, seed) -> list[str]:
    """Writes the files of every split and kind; returns the kinds of training."""
    encoder = image_tokenizer.ImageTokenizer.load(tokenizer, side=side, max_batch=64)
    trained: list[str] = []
    for split, count in counts.items():
        rng = np.random.default_rng([seed, len(split)])
        album = load(split, encoder.side)
        for kind in _possible(album, kinds, images, split):
            print(f"[lvm] making {count} sentences of kind {kind} ({split})", file=sys.stderr)
            if kind == "mask":
                drawn = list(album.masks(count, images))
            else:
                drawn = [album.draw(kind, images, rng) for _ in range(count)]
            path = folder / f"{split}_{kind}.array_record"
            visual_sentences.write(path, _tokenize(drawn, encoder, kind))
            trained += [kind] if split == "train" else []
    token_files.write_manifest(folder, encoder)
    return trained


def _possible(album: albums.Album, kinds: Sequence[str], images: int, split: str) -> list[str]:
    """The kinds that the album has enough for.

    Raises:
      DataError: none, or not those that were asked for.
    """
    reasons = {kind: album.why_not(kind, images) for kind in kinds or _OWN_KINDS}
    possible = [kind for kind, reason in reasons.items() if not reason]
    impossible = [f"{kind}: {reason}" for kind, reason in reasons.items() if reason]
    if not possible or (kinds and impossible):
        raise records.DataError(
            f"no sentences of {images} images for the {split} split: {'; '.join(impossible)}. "
            f"Give more files, a larger share (heldout), or shorter sentences (prepare.images)"
        )
    for reason in impossible:
        print(f"[lvm] {split}: no sentences of kind {reason}", file=sys.stderr)
    return possible


def _own(listing, heldout, most, length, split: str, side: int) -> albums.Album:
    held = own_files.heldout(listing, heldout)
    for note in listing.notes:
        own_files.say(f"{listing.root}: {note}")
    return albums.own(listing, held, split, side, length, most)


def _digest(listing: own_files.Listing) -> str:
    """Changes when a file does."""
    found = sidecar.fingerprint([listing.root / file.name for file in listing.files])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


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
