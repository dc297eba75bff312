"""Folders, videos and annotations as numbered visual sentences: a layout with its sources.

    plan = plans.make(plans.Options(layout="pairs", input="photos", annotations=("depth",)))
    plan.draw(7)        the pictures of sentence 7, in order; nothing is decoded yet

Sentence n is the same whatever was drawn before it, in any process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

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
class Plan:
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


def make(options: Options) -> Plan:
    """Finds the files and lays out the sentences.

    Raises:
      DataError: nothing there, files that do not match, too few for one sentence, or options that
        the layout does not have.
    """
    if options.layout not in LAYOUTS:
        raise records.DataError(
            f"no layout {options.layout!r}; there are {', '.join(sorted(LAYOUTS))}"
        )
    _check(options)
    sources = _Sources(options)
    per_epoch, draw = LAYOUTS[options.layout](options, sources)
    if per_epoch < 1:
        raise records.DataError(
            f"{options.input}: {sources.files} files are too few for one sentence of the layout "
            f"{options.layout!r}; lower --images, --shots or --clips"
        )
    count = options.sentences or options.epochs * per_epoch
    digest = sources.digest.hexdigest()
    images = _length(options)
    return Plan(count, images, draw, sources.drawings, sources.files, digest, sources.notes)


def _length(options: Options) -> int:
    """Images of a sentence."""
    kinds = 1 + len(options.annotations)
    if options.layout == "multi":
        return options.shots * (options.elements or kinds)
    if options.layout == "annotated_video":
        return (options.clips or 2) * (options.frames or 16) * kinds
    if options.layout == "co3d":
        return (options.clips or 4) * (options.frames or 4) * 2
    return 1 if options.layout == "single" else options.images or 16


def _check(options: Options) -> None:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in _USES[options.layout] + _COMMON and value != field.default:
            raise records.DataError(f"the layout {options.layout!r} takes no --{field.name}")
        least = 1 if field.name in ("max_stride", "stride", "per_class", "shots", "epochs") else 0
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and number < least for number in numbers):
            raise records.DataError(f"--{field.name}={value} must be at least {least}")
    if options.order not in ("blocks", "interleaved", "both"):
        raise records.DataError(f"--order={options.order} is not blocks, interleaved or both")
    if options.images % 2 and options.layout in ("pairs", "colorization", "inpainting"):
        raise records.DataError(f"--images={options.images} is odd; pairs need an even number")
    given = len(options.annotations)
    if (options.layout == "pairs" and given != 1) or (options.layout in _ANNOTATED and not given):
        some = "exactly one of" if options.layout == "pairs" else "one or more"
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
        named = message if message.startswith(what) else f"{what}: {message}"
        raise records.BadRecordError(named) from error


def _single(options: Options, sources: _Sources) -> tuple[int, Draw]:
    names = sources.list()
    return len(names), lambda number: [sources.picture(names[number % len(names)])]


def _video(options: Options, sources: _Sources) -> tuple[int, Draw]:
    names = sources.list(folders.VIDEOS)
    strides = options.stride or (8,)

    def draw(number: int) -> list[pictures.Picture]:
        turn, place = divmod(number, len(names))
        path = os.path.join(options.input, names[place])
        with _naming(path):
            chosen = layouts.video_clip(
                range(video.count_frames(path)),
                options.rng(number),
                num_images=options.images or 16,
                stride=strides[turn % len(strides)],
            )
        return [pictures.Picture(path, frame) for frame in chosen]

    return len(names) * len(strides), draw


def _frames(options: Options, sources: _Sources) -> tuple[int, Draw]:
    clips = list(folders.by_folder(sources.list()).items())

    def draw(number: int) -> list[pictures.Picture]:
        folder, names = clips[number % len(clips)]
        with _naming(os.path.join(options.input, folder)):
            chosen = layouts.any_stride_clip(
                names,
                options.rng(number),
                num_images=options.images or 16,
                max_stride=options.max_stride,
            )
        return [sources.picture(name) for name in chosen]

    return len(clips), draw


def _rotation(options: Options, sources: _Sources) -> tuple[int, Draw]:
    things = list(folders.by_folder(sources.list()).items())
    steps = options.stride or (1,)

    def draw(number: int) -> list[pictures.Picture]:
        turn, place = divmod(number, len(things))
        folder, names = things[place]
        with _naming(os.path.join(options.input, folder)):
            chosen = layouts.rotation(
                names,
                options.rng(number),
                num_images=options.images or 16,
                step=steps[turn % len(steps)],
            )
        return [sources.picture(name) for name in chosen]

    return len(things) * len(steps), draw


def _category(options: Options, sources: _Sources) -> tuple[int, Draw]:
    names = sources.list()
    by_class = folders.by_class(names)
    images, passes = options.images or 16, options.per_class
    for size in passes:
        if images % size:
            raise records.DataError(f"--per_class={size} does not divide --images={images}")
        # Too few classes or images show here.
        layouts.category_groups(by_class, options.rng(0), num_images=images, per_class=size)
    per_pass = max(1, len(names) // images)

    def draw(number: int) -> list[pictures.Picture]:
        size = passes[number // per_pass % len(passes)]
        chosen = layouts.category_groups(
            by_class, options.rng(number), num_images=images, per_class=size
        )
        return [sources.picture(name) for name in chosen]

    return per_pass * len(passes), draw


def _pairs(options: Options, sources: _Sources) -> tuple[int, Draw]:
    shots = list(sources.aligned().values())
    size = (options.images or 16) // 2

    def draw(number: int) -> list[pictures.Picture]:
        chosen = [shots[i] for i in layouts.group(number, len(shots), size, options.seed)]
        return layouts.pairs(*zip(*chosen))

    return len(shots) // max(1, size), draw


def _colorization(options: Options, sources: _Sources) -> tuple[int, Draw]:
    return _altered(options, sources, lambda photos, rng: layouts.colorization(photos))


def _inpainting(options: Options, sources: _Sources) -> tuple[int, Draw]:
    return _altered(options, sources, layouts.inpainting)


def _altered(options: Options, sources: _Sources, layout) -> tuple[int, Draw]:
    names = sources.list()
    size = (options.images or 16) // 2

    def draw(number: int) -> list[pictures.Picture]:
        chosen = layouts.group(number, len(names), size, options.seed)
        return layout([sources.picture(names[i]) for i in chosen], options.rng(number))

    return len(names) // max(1, size), draw


def _multi(options: Options, sources: _Sources) -> tuple[int, Draw]:
    shots = list(sources.aligned().values())
    if options.elements > len(options.annotations) + 1:
        raise records.DataError(
            f"--elements={options.elements} of an image with {len(options.annotations)} annotations"
        )

    def draw(number: int) -> list[pictures.Picture]:
        chosen = [shots[i] for i in layouts.group(number, len(shots), options.shots, options.seed)]
        return layouts.modalities(chosen, options.rng(number), elements=options.elements)

    return len(shots) // options.shots, draw


def _annotated_video(options: Options, sources: _Sources) -> tuple[int, Draw]:
    moments = sources.aligned()
    clips = list(folders.by_folder(list(moments)).items())
    size, frames = options.clips or 2, options.frames or 16
    orders = ("blocks", "interleaved") if options.order == "both" else (options.order,)

    def draw(number: int) -> list[pictures.Picture]:
        # Equal generators, so that both orders show the same frames.
        place, turn = divmod(number, len(orders))
        rng, tracks = options.rng(place), []
        for i in layouts.group(place, len(clips), size, options.seed):
            folder, names = clips[i]
            with _naming(os.path.join(options.input, folder)):
                chosen = layouts.any_stride_clip(
                    names, rng, num_images=frames, max_stride=options.max_stride
                )
            tracks.append(list(zip(*(moments[name] for name in chosen))))
        return layouts.annotated_clips(tracks, interleaved=orders[turn] == "interleaved")

    return len(clips) // size * len(orders), draw


def _co3d(options: Options, sources: _Sources) -> tuple[int, Draw]:
    """Folders CATEGORY/OBJECT/{images,masks,depth_masks}, as CO3D unpacks."""
    kinds = options.annotations or ("masks", "depth_masks")
    names = folders.by_folder(sources.list())
    things = [folder.rpartition("/")[0] for folder in names if folder.split("/")[-1] == "images"]
    if not things:
        raise records.DataError(f"{options.input}: no object folder holds a folder 'images'")
    tracks = {}
    for thing in things:
        root = os.path.join(options.input, thing)
        for kind in kinds:
            both = [os.path.join(root, "images"), os.path.join(root, kind)]
            rows = folders.paired(both, options.match)
            tracks[thing, kind] = [
                [pictures.Picture(os.path.join(folder, name)) for name in column]
                for folder, column in zip(both, zip(*rows))
            ]
    size, per_object = options.clips or 4, options.frames or 4

    def draw(number: int) -> list[pictures.Picture]:
        place, turn = divmod(number, len(kinds))
        chosen = [things[i] for i in layouts.group(place, len(things), size, options.seed)]
        with _naming(", ".join(chosen)):
            return layouts.objects(
                [tracks[thing, kinds[turn]] for thing in chosen],
                options.rng(place),
                per_object=per_object,
            )

    return len(things) // size * len(kinds), draw


# Name on the command line -> builder, which returns the sentences of one epoch and how to draw.
LAYOUTS: dict[str, Callable[[Options, _Sources], tuple[int, Draw]]] = {
    "single": _single,
    "video": _video,
    "frames": _frames,
    "rotation": _rotation,
    "category": _category,
    "pairs": _pairs,
    "colorization": _colorization,
    "inpainting": _inpainting,
    "multi": _multi,
    "annotated_video": _annotated_video,
    "co3d": _co3d,
}

# Options that a layout reads, besides these; any other would be ignored and is an error.
_COMMON = ("layout", "input", "epochs", "sentences", "seed")
_ANNOTATED = ("pairs", "multi", "annotated_video")
_USES: dict[str, tuple[str, ...]] = {
    "single": (),
    "video": ("images", "stride"),
    "frames": ("images", "max_stride"),
    "rotation": ("images", "stride"),
    "category": ("images", "per_class"),
    "pairs": ("annotations", "match", "images"),
    "colorization": ("images",),
    "inpainting": ("images",),
    "multi": ("annotations", "match", "shots", "elements"),
    "annotated_video": ("annotations", "match", "max_stride", "frames", "clips", "order"),
    "co3d": ("annotations", "match", "frames", "clips"),
}
