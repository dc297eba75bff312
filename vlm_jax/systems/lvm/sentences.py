"""Folders, videos and annotations as numbered visual sentences: a layout with its sources.

    made = sentences.make(sentences.Options("pairs", "photos", annotations=("depth",)))
    made.draw(7)        the images of sentence 7, in order; nothing is decoded yet

Sentence n is the same whatever was drawn before it, in any process. A layout is a row of `LAYOUTS`:
what sentences are made of, how many of these a sentence takes, in which variants, and how
they are arranged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import drawing, folders, pictures, records, video
from vlm_jax.systems.lvm import layouts

Draw = Callable[[int], list[pictures.Picture]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to make of what. A 0 or () is the default of the layout.

    Attributes:
      layout: one of LAYOUTS.
      input: folder of images or videos.
      annotations: folders that match `input`, drawings (see `drawing`), or, for co3d, names of
        sub-folders.
      match: how folders match, see `folders.paired`.
      images: of a sentence (single 1, others 16). Fixed by the other numbers for several
        annotations, annotated video and co3d.
      stride: frames between images, or views (video 8, rotation 1); several are so many passes.
      max_stride: of frame folders and annotated video.
      per_class: images of a class in a row; several are so many passes.
      shots, elements: images with several annotations: how many, and how many of the modalities
        of each (0 all).
      frames, clips: of a clip (16), clips of a sentence (2); co3d: of an object (4), objects (4).
      order: of annotated video: "blocks", "interleaved" or "both" (every clip in each).
      epochs: passes over the data. sentences: exactly so many instead.
      seed: of everything drawn at random.
    """

    layout: str
    input: str
    annotations: tuple[str, ...] = ()
    match: str = "stem"
    images: int = 0
    stride: tuple[int, ...] = ()
    max_stride: int = 4
    per_class: tuple[int, ...] = (4,)
    shots: int = 3
    elements: int = 0
    frames: int = 0
    clips: int = 0
    order: str = "both"
    epochs: int = 1
    sentences: int = 0
    seed: int = 0

    def rng(self, number: int) -> np.random.Generator:
        """The generator of one sentence."""
        return np.random.default_rng([self.seed, number])


@dataclasses.dataclass(frozen=True)
class Sentences:
    """All sentences.

    Attributes:
      count: of sentences. images: of a sentence.
      draw: number -> pictures; BadRecordError where the source is too short or unreadable.
      drawings: for `pictures.Reader`.
      files: images or videos that the sentences are made of.
      digest: of their names and of the annotations.
      notes: what was left out, for people.
    """

    count: int
    images: int
    draw: Draw
    drawings: Mapping[str, drawing.Drawing]
    files: int
    digest: str
    notes: Sequence[str]


def make(options: Options) -> Sentences:
    """Finds the files and lays out the sentences.

    Raises:
      DataError: nothing there, files that do not match, too few for one sentence, or options that
        the layout does not have.
    """
    if options.layout not in LAYOUTS:
        raise records.DataError(
            f"no layout {options.layout!r}; there are {', '.join(sorted(LAYOUTS))}"
        )
    layout = LAYOUTS[options.layout]
    _check(options, layout)
    sources = _Sources(options)
    items = layout.items(options, sources)
    variants, size = layout.variants(options), layout.size(options)
    per_pass = _per_pass(items, size, options)
    per_epoch = per_pass * len(variants)
    if per_epoch < 1:
        raise records.DataError(
            f"{options.input}: {sources.files} files are too few for one sentence of the layout "
            f"{options.layout!r}; lower --images, --shots or --clips"
        )

    def draw(number: int) -> list[pictures.Picture]:
        if isinstance(size, int):
            # Variants of a sentence are neighbours and get equal generators: the same images.
            place, turn = divmod(number, len(variants))
            chosen = [items[i] for i in layouts.group(place, len(items), size, options.seed)]
            rng = options.rng(place)
        else:
            # Everything once per variant; the generator is the sentence's own.
            turn, place = divmod(number, per_pass)
            chosen = items if size == "all" else [items[place]]
            rng = options.rng(number)
        with _naming(", ".join(item.name for item in chosen) if layout.names_items else ""):
            return layout.arrange(options, chosen, rng, variants[turn % len(variants)])

    count = options.sentences or options.epochs * per_epoch
    digest, images = sources.digest.hexdigest(), layout.images(options)
    return Sentences(count, images, draw, sources.drawings, sources.files, digest, sources.notes)


def _per_pass(items: Sequence[Any], size: int | str, options: Options) -> int:
    if size == "all":
        return max(1, len(items) // (options.images or 16))
    return len(items) if size == "one" else len(items) // max(1, int(size))


def _check(options: Options, layout: Layout) -> None:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in layout.uses + _COMMON and value != field.default:
            raise records.DataError(f"the layout {options.layout!r} takes no --{field.name}")
        least = 1 if field.name in ("max_stride", "stride", "per_class", "shots", "epochs") else 0
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and number < least for number in numbers):
            raise records.DataError(f"--{field.name}={value} must be at least {least}")
    if options.order not in ("blocks", "interleaved", "both"):
        raise records.DataError(f"--order={options.order} is not blocks, interleaved or both")
    if options.images % 2 and layout.size is _pairs_of:
        raise records.DataError(f"--images={options.images} is odd; pairs need an even number")
    given = len(options.annotations)
    if (layout.annotations == "one" and given != 1) or (layout.annotations == "some" and not given):
        some = "exactly one of" if layout.annotations == "one" else "one or more"
        raise records.DataError(f"the layout {options.layout!r} takes {some} --annotations")


class _Sources:
    """Finds the files, and remembers what a manifest says about them."""

    def __init__(self, options: Options):
        self._options = options
        self.drawings: dict[str, drawing.Drawing] = {}
        self.digest = hashlib.sha256()
        self.files = 0
        self.notes: list[str] = []

    def found(self, names: Iterable[str]) -> None:
        """Counts names and adds them to the digest."""
        names = list(names)
        self.files += len(names)
        self.digest.update(os.fsencode("\n".join(names)))

    def list(self, suffixes: Sequence[str] = folders.IMAGES) -> list[str]:
        """Relative paths below the input."""
        names = folders.list_files(self._options.input, suffixes)
        self.found(names)
        return names

    def picture(self, name: str) -> pictures.Picture:
        """A still of the input."""
        return pictures.Picture(os.path.join(self._options.input, name))

    def aligned(self) -> dict[str, tuple[pictures.Picture, ...]]:
        """Name -> the image and its annotations, in the order of the options."""
        options = self._options
        roots = [a for a in options.annotations if os.path.isdir(os.path.expanduser(a))]
        rows = folders.paired([options.input, *roots], options.match)
        self.found("\n".join(row) for row in rows)
        calls = [a for a in options.annotations if a not in roots]
        self.drawings = {call: drawing.load(call) for call in calls}
        known = {
            call: {folders.canonical(name): name for name in self.drawings[call].things}
            for call in calls
        }
        result, empty = {}, 0
        for row in rows:
            names = {call: self._name_in(call, known[call], row[0]) for call in calls}
            if any(not self.drawings[call].has(name) for call, name in names.items()):
                empty += 1
                continue
            beside = dict(zip(roots, row[1:]))
            result[row[0]] = (
                self.picture(row[0]),
                *(
                    pictures.Picture(os.path.join(options.input, row[0]), drawn=(a, names[a]))
                    if a in names
                    else pictures.Picture(os.path.join(a, beside[a]))
                    for a in options.annotations
                ),
            )
        for call in calls:
            with open(os.path.expanduser(drawing.split(call)[0]), "rb") as stream:
                self.digest.update(hashlib.file_digest(stream, "sha256").digest())
        if empty:
            self.notes.append(f"{empty} of {len(rows)} images have nothing to draw: left out")
        return result

    def _name_in(self, call: str, known: Mapping[str, str], name: str) -> str:
        for wanted in (name, os.path.basename(name)):
            if folders.canonical(wanted) in known:
                return known[folders.canonical(wanted)]
        raise records.DataError(
            f"{drawing.split(call)[0]}: says nothing about {self._options.input}/{name}"
        )


@contextlib.contextmanager
def _naming(what: str):
    """Layouts do not know whose frames they arrange."""
    try:
        yield
    except records.BadRecordError as error:
        message = str(error)
        named = message if message.startswith(what) or not what else f"{what}: {message}"
        raise records.BadRecordError(named) from error


# ---- what sentences are made of ---------------------------------------------------------------


class _Item(NamedTuple):
    """Part of a sentence: its name for messages, and what it holds."""

    name: str
    holds: Any


def _stills(options, sources):
    """Every image."""
    return [_Item(name, sources.picture(name)) for name in sources.list()]


def _videos(options, sources):
    """Every video, not opened yet."""
    names = sources.list(folders.VIDEOS)
    return [_Item(path, path) for path in (os.path.join(options.input, name) for name in names)]


def _clips(options, sources):
    """Every folder of frames, or of views of one object."""
    return [
        _Item(os.path.join(options.input, folder), [sources.picture(name) for name in names])
        for folder, names in folders.by_folder(sources.list()).items()
    ]


def _classes(options, sources):
    """Every image; the class is its folder."""
    items = _stills(options, sources)
    for size in options.per_class:
        if (options.images or 16) % size:
            raise records.DataError(
                f"--per_class={size} does not divide --images={options.images or 16}"
            )
        # Too few classes or images show here.
        _grouped(options, items, options.rng(0), size)
    return items


def _annotated(options, sources):
    """Every image with its annotations."""
    return [_Item(name, shot) for name, shot in sources.aligned().items()]


def _annotated_few(options, sources):
    if options.elements > len(options.annotations) + 1:
        raise records.DataError(
            f"--elements={options.elements} of an image with {len(options.annotations)} annotations"
        )
    return _annotated(options, sources)


def _annotated_clips(options, sources):
    """Every folder of frames, each with its annotations."""
    moments = sources.aligned()
    return [
        _Item(os.path.join(options.input, folder), [moments[name] for name in names])
        for folder, names in folders.by_folder(list(moments)).items()
    ]


def _objects(options, sources):
    """Folders CATEGORY/OBJECT/{images,masks,depth_masks}, as CO3D unpacks."""
    names = folders.by_folder(sources.list())
    things = [folder.rpartition("/")[0] for folder in names if folder.split("/")[-1] == "images"]
    if not things:
        raise records.DataError(f"{options.input}: no object folder holds a folder 'images'")
    items = []
    for thing in things:
        root, tracks = os.path.join(options.input, thing), {}
        for kind in _kinds(options):
            both = [os.path.join(root, "images"), os.path.join(root, kind)]
            rows = folders.paired(both, options.match)
            tracks[kind] = [
                [pictures.Picture(os.path.join(folder, name)) for name in column]
                for folder, column in zip(both, zip(*rows))
            ]
        items.append(_Item(thing, tracks))
    return items


# ---- how many of these, in which variants ------------------------------------------------------


def _pairs_of(options):
    return (options.images or 16) // 2


def _strides(default):
    return lambda options: options.stride or (default,)


def _orders(options):
    return ("blocks", "interleaved") if options.order == "both" else (options.order,)


def _kinds(options):
    return options.annotations or ("masks", "depth_masks")


# ---- how they are arranged ---------------------------------------------------------------------


def _as_it_is(options, items, rng, variant):
    return [items[0].holds]


def _of_video(options, items, rng, stride):
    path = items[0].holds
    frames, images = range(video.count_frames(path)), options.images or 16
    chosen = layouts.video_clip(frames, rng, num_images=images, stride=stride)
    return [pictures.Picture(path, frame) for frame in chosen]


def _of_frames(options, items, rng, variant):
    images = options.images or 16
    return layouts.any_stride_clip(
        items[0].holds, rng, num_images=images, max_stride=options.max_stride
    )


def _of_views(options, items, rng, step):
    return layouts.rotation(items[0].holds, rng, num_images=options.images or 16, step=step)


def _grouped(options, items, rng, size):
    holds = {item.name: item.holds for item in items}
    images, classes = options.images or 16, folders.by_class(list(holds))
    chosen = layouts.category_groups(classes, rng, num_images=images, per_class=size)
    return [holds[name] for name in chosen]


def _paired(options, items, rng, variant):
    return layouts.pairs(*zip(*(item.holds for item in items)))


def _colorized(options, items, rng, variant):
    return layouts.colorization([item.holds for item in items])


def _inpainted(options, items, rng, variant):
    return layouts.inpainting([item.holds for item in items], rng)


def _modalities(options, items, rng, variant):
    return layouts.modalities([item.holds for item in items], rng, elements=options.elements)


def _tracks(options, items, rng, variant):
    tracks = []
    for item in items:
        with _naming(item.name):
            chosen = layouts.any_stride_clip(
                item.holds, rng, num_images=options.frames or 16, max_stride=options.max_stride
            )
        tracks.append(list(zip(*chosen)))
    return layouts.annotated_clips(tracks, interleaved=variant == "interleaved")


def _of_objects(options, items, rng, kind):
    tracks = [item.holds[kind] for item in items]
    return layouts.objects(tracks, rng, per_object=options.frames or 4)


# ---- the table ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """One kind of sentence.

    Attributes:
      items: (options, sources) -> what sentences are made of.
      arrange: (options, items of a sentence, generator, variant) -> its images.
      uses: options that it reads, besides `_COMMON`; any other would be ignored and is an error.
      size: options -> items of a sentence: a number, drawn anew in every epoch; "one", each in its
        turn; "all", the layout chooses among all.
      variants: options -> what a sentence is made in, one after the other.
      images: options -> images of a sentence.
      annotations: "" takes none or has its own, "one", "some".
      names_items: whether messages name the items of the sentence.
    """

    items: Callable[[Options, _Sources], Sequence[_Item]]
    arrange: Callable[..., list[pictures.Picture]]
    uses: tuple[str, ...] = ()
    size: Callable[[Options], int | str] = lambda options: "one"
    variants: Callable[[Options], tuple[Any, ...]] = lambda options: (None,)
    images: Callable[[Options], int] = lambda options: options.images or 16
    annotations: str = ""
    names_items: bool = False


LAYOUTS = {
    "single": Layout(_stills, _as_it_is, images=lambda options: 1),
    "video": Layout(
        _videos, _of_video, ("images", "stride"), variants=_strides(8), names_items=True
    ),
    "frames": Layout(_clips, _of_frames, ("images", "max_stride"), names_items=True),
    "rotation": Layout(
        _clips, _of_views, ("images", "stride"), variants=_strides(1), names_items=True
    ),
    "category": Layout(
        _classes,
        _grouped,
        ("images", "per_class"),
        size=lambda options: "all",
        variants=lambda options: options.per_class,
    ),
    "pairs": Layout(
        _annotated,
        _paired,
        ("annotations", "match", "images"),
        size=_pairs_of,
        annotations="one",
    ),
    "colorization": Layout(_stills, _colorized, ("images",), size=_pairs_of),
    "inpainting": Layout(_stills, _inpainted, ("images",), size=_pairs_of),
    "multi": Layout(
        _annotated_few,
        _modalities,
        ("annotations", "match", "shots", "elements"),
        size=lambda options: options.shots,
        images=lambda options: options.shots * (options.elements or 1 + len(options.annotations)),
        annotations="some",
    ),
    "annotated_video": Layout(
        _annotated_clips,
        _tracks,
        ("annotations", "match", "max_stride", "frames", "clips", "order"),
        size=lambda options: options.clips or 2,
        variants=_orders,
        images=lambda options: (
            (options.clips or 2) * (options.frames or 16) * (1 + len(options.annotations))
        ),
        annotations="some",
    ),
    "co3d": Layout(
        _objects,
        _of_objects,
        ("annotations", "match", "frames", "clips"),
        size=lambda options: options.clips or 4,
        variants=_kinds,
        images=lambda options: (options.clips or 4) * (options.frames or 4) * 2,
        names_items=True,
    ),
}
_COMMON = ("layout", "input", "epochs", "sentences", "seed")
