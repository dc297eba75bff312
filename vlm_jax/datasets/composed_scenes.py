"""Sentences of composed scenes, drawn on the device: tasks by example without end.

    kind     sentence of four pairs                           what the examples say
    mask     scene, the thing white on black                  what to mark, and how
    box      scene, the smallest box around it, filled        that it is the box
    edges    scene, its edges white on black                  that it is edges
    colour   grey scene, the scene in two colours             which two colours
    photo    grey photo, the photo                            nothing but the task
    motion   a thing moving over a texture, eight frames      where it goes

A scene is one thing on one ground, every pixel of which has an exact owner:

    things    real cut-outs (`demo_scenes`), every label equally often; four in ten are filled with
              a piece of a photo instead, so that no list of things can be learned by heart
    grounds   real textures, or small windows of photos
    both      mirrored, turned, stretched, with other gains of red, green and blue

Drawn at twice the side and halved, pasted with a hard edge. One split only: what is held out of
cut-outs, textures and photos (datasets/demo_*.py) is never seen in the other.

    scenes = Scenes("train", side=32)
    for images_u8 in scenes.draw("mask", 1000): ...          # uint8[64, 8, 32, 32, 3] at a time
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vlm_jax.data import images, records
from vlm_jax.datasets import demo_photos, demo_scenes, palette_scenes

IMAGES = 8  # of a sentence
_NUMBERS = 160  # random ones of a sentence
_SIDE = 64  # pixels of what the banks hold
_FILLED = 0.4  # share of things with a piece of a photo instead of their own surface
_WINDOWS = 0.4  # share of grounds that are windows of photos


class Scenes:
    """Draws sentences of one split. Sentence n follows from the seed, the kind and n alone.

    Args:
      split: "train" or "heldout".
      side: pixels of an image.
      chunk: sentences of a device call.
      seed: of everything drawn.
      bank: what scenes are made of instead, see `make_bank`.
    """

    def __init__(
        self,
        split: str,
        *,
        side: int = 32,
        chunk: int = 64,
        seed: int = 0,
        bank: Mapping[str, np.ndarray] | None = None,
    ):
        self.side, self.chunk, self.seed = side, chunk, seed
        self._bank = jax.device_put(make_bank(split, seed) if bank is None else dict(bank))
        self._compiled: dict[str, Callable] = {}

    def draw(
        self, kind: str, count: int, then: Callable[[jax.Array], jax.Array] | None = None
    ) -> Iterator[np.ndarray]:
        """The first `count` sentences of a kind, a chunk at a time.

        Args:
          kind: one of KINDS.
          count: of sentences.
          then: uint8[chunk, 8, side, side, 3] -> array[chunk, ...], on the device: a tokenizer.

        Yields:
          uint8[n, 8, side, side, 3], or what `then` makes of them.

        Raises:
          DataError: unknown kind.
        """
        (function,) = self.compile([kind])
        ahead = None  # one call, so that the device does not wait for the copy
        for start in range(0, count, self.chunk):
            drawn = function(self._bank, self._numbers(kind, start))
            drawn = then(drawn) if then else drawn
            if ahead is not None:
                yield np.asarray(ahead)
            ahead = drawn
        if ahead is not None:
            yield np.asarray(ahead)[: count - start]

    def compile(self, kinds: Iterable[str]) -> list[Callable]:
        """The functions behind `draw`, compiled side by side; ahead of use, where time matters."""
        kinds = list(kinds)
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise records.DataError(f"no scenes of kind {unknown}; known: {', '.join(KINDS)}")

        def one(kind):
            if kind not in self._compiled:
                lowered = jax.jit(functools.partial(self._chunk_of, kind)).lower(
                    self._bank, self._numbers(kind, 0)
                )
                self._compiled[kind] = lowered.compile()
            return self._compiled[kind]

        with concurrent.futures.ThreadPoolExecutor() as pool:
            return list(pool.map(one, kinds))

    def _numbers(self, kind, start):
        """float32[chunk, NUMBERS] in [0, 1): all that is random; drawn here, nothing compiles."""
        rng = np.random.default_rng([self.seed, list(KINDS).index(kind), start])
        return rng.random((self.chunk, _NUMBERS), np.float32)

    def _chunk_of(self, kind, bank, numbers):
        def sentence(row):
            return KINDS[kind](_Dice(row), bank, self.side)

        drawn = jax.vmap(sentence)(numbers)
        return jnp.round(jnp.clip(drawn, 0, 1) * 255).astype(jnp.uint8)


class _Dice:
    """Uniform numbers, taken one after the other from float32[n]."""

    def __init__(self, numbers):
        self._numbers, self._taken = numbers, 0

    def __call__(self, low=0.0, high=1.0, count=None):
        """A number in [low, high), or `count` of them."""
        start, self._taken = self._taken, self._taken + (count or 1)
        if self._taken > len(self._numbers):
            raise ValueError(f"a sentence takes more than {len(self._numbers)} numbers")
        taken = self._numbers[start : self._taken] if count else self._numbers[start]
        return low + (high - low) * taken

    def below(self, end):
        """An integer in [0, end)."""
        return (self() * end).astype(jnp.int32)

    def happens(self, odds=0.5):
        """bool."""
        return self() < odds

    def several(self, count, each=32):
        """`count` dice of `each` numbers, as the argument of a vmap."""
        return self(count=count * each).reshape(count, each)


@functools.cache
def make_bank(split: str, seed: int = 0, crops: int = 1500) -> dict[str, np.ndarray]:
    """What scenes of one split are made of.

    Returns:
      things uint8[C, 64, 64, 4], cut-outs in the middle of squares; odds float32[C - 1], where a
      uniform number passes from one to the next; extents float32[C, 2], height and width in the
      square, at most 1; grounds uint8[crops, 64, 64, 3]; photos uint8[P, 64, 64, 3].
    """
    rng = np.random.default_rng([seed, split == "heldout"])
    photos = demo_photos.Photos(split, crops if split == "train" else 0, _SIDE, seed)
    return {
        **bank_of_things(demo_scenes.cutouts(split)),
        "grounds": np.stack([demo_scenes.texture(split, _SIDE, rng) for _ in range(crops)]),
        "photos": np.stack([photos[i]["image_u8"] for i in range(len(photos))]),
    }


def bank_of_things(cutouts: Sequence[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The part of a bank that (label, uint8[H, W, 4]) make: things, odds, extents."""
    labels = [label for label, _ in cutouts]
    odds = np.array([1 / labels.count(label) for label in labels], np.float32)
    return {
        "things": np.stack([_in_square(rgba) for _, rgba in cutouts]),
        "odds": np.cumsum(odds / odds.sum())[:-1],
        "extents": np.array([_extent(rgba) for _, rgba in cutouts], np.float32),
    }


def _extent(rgba: np.ndarray) -> np.ndarray:
    return np.array(rgba.shape[:2]) / max(rgba.shape[:2])


def _in_square(rgba: np.ndarray) -> np.ndarray:
    """The cut-out with its longer side at 64 pixels."""
    scale = _SIDE / max(rgba.shape[:2])
    height, width = (max(2, round(length * scale)) for length in rgba.shape[:2])
    small = np.array(Image.fromarray(rgba).resize((width, height), Image.Resampling.LANCZOS))
    square = np.zeros((_SIDE, _SIDE, 4), np.uint8)
    y, x = (_SIDE - height) // 2, (_SIDE - width) // 2
    square[y : y + height, x : x + width] = small
    return square


# ---- one sentence: (dice, bank, side) -> float32[IMAGES, side, side, 3] ------------------------


def _mask(dice, bank, side):
    image, inside = _scenes(dice, bank, side)
    return _pairs(image, _white(inside))


def _box(dice, bank, side):
    image, inside = _scenes(dice, bank, side)
    rows, columns = _span(inside.any(axis=2)), _span(inside.any(axis=1))
    return _pairs(image, _white(rows[:, :, None] & columns[:, None, :]))


def _edges(dice, bank, side):
    image, _ = _scenes(dice, bank, side)
    light = jnp.pad(_grey(image)[..., 0], ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = light[:, 2:, 1:-1] - light[:, :-2, 1:-1]
    right = light[:, 1:-1, 2:] - light[:, 1:-1, :-2]
    return _pairs(image, _three(jnp.clip(2 * jnp.hypot(down, right), 0, 1)))


def _colour(dice, bank, side):
    known = jnp.asarray(palette_scenes.palettes("train"))
    thing, ground = jnp.asarray(palette_scenes.COLOURS)[known[dice.below(len(known))]]
    image, inside = _scenes(dice, bank, side)
    painted = palette_scenes.paint(image, inside, thing, ground)
    return _pairs(_grey(painted), painted)


def _photo(dice, bank, side):
    def one(numbers):
        dice = _Dice(numbers)
        photo = bank["photos"][dice.below(len(bank["photos"]))]
        return _halve(_window(dice, photo, 2 * side, 0.7, 1.0))

    image = jax.vmap(one)(dice.several(IMAGES // 2))
    return _pairs(_grey(image), image)


def _motion(dice, bank, side):
    thing, extent = _thing(dice, bank)
    ground = _ground(dice, bank, side)
    size, turn = _pose(dice)
    start, end = _place(dice, size, extent), _place(dice, size, extent)
    at = start + jnp.linspace(0, 1, IMAGES)[:, None] * (end - start)
    return jax.vmap(lambda at: _paste(thing, ground, size, turn, at)[0])(at)


# Kind -> the function that draws a sentence.
KINDS = {
    "mask": _mask,
    "box": _box,
    "edges": _edges,
    "colour": _colour,
    "photo": _photo,
    "motion": _motion,
}


def _pairs(questions, answers):
    return jnp.stack([questions, answers], axis=1).reshape(-1, *questions.shape[1:])


def _white(inside):
    return _three(inside.astype(jnp.float32))


def _three(light):
    return jnp.repeat(light[..., None], 3, axis=-1)


def _grey(image):
    return _three(image @ jnp.asarray(images.GREY_WEIGHTS, jnp.float32))


def _span(marked):
    """bool[N, S] -> from the first marked place to the last."""
    return (jnp.cumsum(marked, axis=1) > 0) & (jnp.cumsum(marked[:, ::-1], axis=1)[:, ::-1] > 0)


# ---- one scene ---------------------------------------------------------------------------------


def _scenes(dice, bank, side):
    """(float32[4, side, side, 3], bool[4, side, side] where the thing is)."""

    def one(numbers):
        dice = _Dice(numbers)
        thing, extent = _thing(dice, bank)
        ground = _ground(dice, bank, side)
        size, turn = _pose(dice)
        return _paste(thing, ground, size, turn, _place(dice, size, extent))

    return jax.vmap(one)(dice.several(IMAGES // 2))


def _thing(dice, bank):
    """(float32[64, 64, 4], its extents)."""
    number = jnp.searchsorted(bank["odds"], dice(), side="right")
    rgba = bank["things"][number] / 255.0
    filling = bank["photos"][dice.below(len(bank["photos"]))] / 255.0
    surface = jnp.where(dice.happens(_FILLED), filling, rgba[..., :3])
    surface = jnp.clip(surface * _gains(dice, 0.5), 0, 1)
    rgba = jnp.concatenate([surface, rgba[..., 3:]], axis=-1)
    return jnp.where(dice.happens(), rgba[:, ::-1], rgba), bank["extents"][number]


def _ground(dice, bank, side):
    """float32[2 * side, 2 * side, 3]."""
    texture = bank["grounds"][dice.below(len(bank["grounds"]))]
    photo = bank["photos"][dice.below(len(bank["photos"]))]
    near = dice.happens(_WINDOWS)
    # A texture more or less as it is, a photo from so near that no thing of its own is whole.
    least, most = jnp.where(near, 0.2, 0.5), jnp.where(near, 0.5, 1.0)
    image = _window(dice, jnp.where(near, photo, texture), 2 * side, least, most)
    return jnp.clip(image * _gains(dice, 0.25), 0, 1)


def _gains(dice, strength):
    """float32[3] around 1; half of the time exactly 1."""
    gains = dice(1 - strength, 1 + strength, 3) * dice(1 - strength, 1 + strength)
    return jnp.where(dice.happens(), gains, 1.0)


def _window(dice, image_u8, side, least, most):
    """A random square window of `least` to `most` of the side, mirrored at random, resampled."""
    part = dice(least, most)
    start = dice(count=2)[:, None] * (1 - part)
    y, x = (start + part * (jnp.arange(side) + 0.5) / side) * _SIDE - 0.5
    x = jnp.where(dice.happens(), x[::-1], x)
    rows, columns = _linear(y), _linear(x)
    return jnp.einsum("ya,abc,xb->yxc", rows, image_u8 / 255.0, columns)


def _linear(place):
    """Weights [n, 64] of linear interpolation at `place`, clamped to the edge."""
    place = jnp.clip(place, 0, _SIDE - 1)
    return jnp.maximum(0, 1 - jnp.abs(place[:, None] - jnp.arange(_SIDE)))


def _pose(dice):
    """(side of the cut-out's square as a share of the image, 2x2 turn and stretch)."""
    size, turned = dice(0.3, 0.65), dice.happens()
    angle = jnp.where(turned, dice(-0.5, 0.5), 0.0)
    stretch = jnp.where(turned, dice(1.0, 1.35, 2), 1.0)
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    return size, rotation * stretch[:, None]


def _place(dice, size, extent):
    """A centre [2] such that the thing, not turned, is inside the image."""
    half = size * extent / 2
    return half + dice(count=2) * (1 - 2 * half)


def _paste(thing, ground, size, turn, at):
    """(float32[side, side, 3], bool[side, side]) of the thing at a place of the ground."""
    axis = (jnp.arange(len(ground)) + 0.5) / len(ground)
    offset = jnp.stack(jnp.meshgrid(axis - at[0], axis - at[1], indexing="ij"), axis=-1)
    place = (offset @ turn.T / size + 0.5) * _SIDE - 0.5
    premultiplied = jnp.concatenate([thing[..., :3] * thing[..., 3:], thing[..., 3:]], axis=-1)
    sampled = _halve(_bilinear(premultiplied, place))
    colour, alpha = sampled[..., :3], sampled[..., 3:]
    inside = alpha >= 0.5
    return jnp.where(inside, colour / jnp.maximum(alpha, 0.5), _halve(ground)), inside[..., 0]


def _bilinear(image, place):
    """float32[64, 64, C] at places [h, w, 2]; 0 outside."""
    low = jnp.floor(place)
    part, low = place - low, low.astype(jnp.int32)
    flat, result = image.reshape(-1, image.shape[-1]), 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            y, x = low[..., 0] + dy, low[..., 1] + dx
            weight = jnp.abs(1 - dy - part[..., 0]) * jnp.abs(1 - dx - part[..., 1])
            known = (y >= 0) & (y < _SIDE) & (x >= 0) & (x < _SIDE)
            at = jnp.clip(y, 0, _SIDE - 1) * _SIDE + jnp.clip(x, 0, _SIDE - 1)
            result += flat[at] * (weight * known)[..., None]
    return result


def _halve(image):
    height, width, channels = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))
