"""Records to batches: a picture and its labels. Numpy only.

    key             dtype[shape]       meaning
    image_u8        uint8[B, S, S, 3]  cut to the tower's side; normalised on the device
    tokens          int32[B, T]        ids of the text (vocabulary.py); <empty> behind its end
    targets         int32[B, T]        the id that follows each input
    weights         float32[B, T]      of each target in the loss; 0 is no loss
    segments        int32[B, T]        1 marker to prompt, then labels; 0: see `masks.labels`
    label_positions int32[B, T]        places when every label starts again behind the prompt
    prompt          int32[B, Q]        marker, BOS, first template: what inference begins with
    host            Host               the labels as its truth, the photo as its image

Places count from the marker; the network adds those of the image. BOS, prompt, labels and
delimiters are targets; EOS is an input and never a target.

A record holds a picture (see `images.of_record`), and `labels`, a list, or a `caption` (`captions`,
`txt`), whose nouns are taken. Without either it is for inference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax import answer
from vlm_jax.data import images, records
from vlm_jax.program import config as config_lib
from vlm_jax.systems.nxtp import label_lists, vocabulary
from vlm_jax.systems.nxtp import labels as labels_lib

_MAX_ASPECT = 100


@dataclasses.dataclass(frozen=True)
class Formatter:
    """See the module.

    Attributes:
      tokenizer: file, see `vocabulary.load`; read when the first record is.
      image_size: S, side of the tower's images.
      max_tokens: T; longer texts are cut.
      prompts: "ten" draws a template for every row (the reference draws one for a batch, which
        makes no difference to a row), "first" always takes the first.
      shuffle: the order of the labels.
      last_label: "released": everything behind the last delimiter, the last label too, sees the
        prompt and not itself, as the released weights were trained; "closed": the last label ends
        in a delimiter and is treated as all others.
      drop_empty: rows without labels have no loss; else they teach the end of the prompt, as in the
        reference.
      tagger: of captions, see `labels.make_tagger`.
    """

    tokenizer: str = ""
    image_size: int = 224
    max_tokens: int = 256  # upstream: 512 with the image's
    prompts: str = "ten"
    shuffle: bool = True
    last_label: str = "released"
    drop_empty: bool = False
    tagger: str = "nltk"

    def __post_init__(self):
        if self.prompts not in ("ten", "first"):
            raise ValueError(f"formatter.prompts={self.prompts!r}: 'ten' or 'first'")
        if self.last_label not in ("released", "closed"):
            raise ValueError(f"formatter.last_label={self.last_label!r}: 'released' or 'closed'")
        for name in ("image_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"formatter.{name}={getattr(self, name)} must be positive")

    @property
    def vocabulary(self) -> vocabulary.Vocabulary:
        """The tokenizer with the special ids."""
        return vocabulary.load(self.tokenizer)

    def __call__(self, record: Mapping[str, Any], rng: Any = None) -> dict[str, np.ndarray]:
        """One example. Without rng: the labels' own order and the first template.

        Raises:
          BadRecordError: no picture that can be read, labels that are no text.
          DataError: no picture or no text among the record's keys.
        """
        picture_u8 = picture_of(record)
        image_u8 = crop(picture_u8, self.image_size)
        labels = labels_lib.of_record(record, self.tagger)
        host = answer.Host(
            truth=answer.Answer(labels=tuple((label, 1.0) for label in labels)),
            size=picture_u8.shape[:2],
            images=(image_u8,),
        )
        return {"image_u8": image_u8, **self.rows(labels, rng), "host": host}

    needs = ("ids", "probs", "lengths")

    def read(
        self, outputs: Mapping[str, np.ndarray], hosts: list[answer.Host]
    ) -> list[answer.Answer]:
        """What predict["one_shot"] found; labels that were cut off are left out."""
        del hosts
        tokenizer = self.vocabulary
        answers = []
        for row in zip(*(outputs[name] for name in ("ids", "probs", "lengths")), strict=True):
            groups = label_lists.one_shot_groups(*row, tokenizer.delimiter_id)
            ranked = label_lists.rank(groups, tokenizer.decode, delimiter_id=tokenizer.delimiter_id)
            answers.append(answer.Answer(labels=tuple((x.text, x.score) for x in ranked)))
        return answers

    def rows(self, labels: Sequence[str], rng: Any = None) -> dict[str, np.ndarray]:
        """All of an example but the picture."""
        prompt = vocabulary.PROMPTS[0]
        shown = list(labels)
        if rng is not None:
            if self.prompts == "ten":
                prompt = vocabulary.PROMPTS[int(rng.integers(len(vocabulary.PROMPTS)))]
            if self.shuffle:
                shown = [shown[i] for i in rng.permutation(len(shown))]
        row = self.encode(prompt, shown)
        if self.drop_empty and not shown:
            row["weights"][:] = 0
        return row

    def encode(self, prompt: str, labels: Sequence[str]) -> dict[str, np.ndarray]:
        """Ids and what belongs to them, in this order of the labels."""
        tokenizer = self.vocabulary
        closed = self.last_label == "closed"
        ids = np.array(tokenizer.text(prompt, labels, closed=closed), np.int32)
        start = len(tokenizer.prompt(prompt))
        size = min(len(ids), self.max_tokens)
        if start > self.max_tokens:
            raise records.DataError(
                f"the prompt is {start} tokens long; raise formatter.max_tokens={self.max_tokens}"
            )

        def blank(value, dtype):
            return np.full(self.max_tokens, value, dtype)

        tokens, targets = blank(tokenizer.empty_id, np.int32), blank(0, np.int32)
        weights, segments = blank(0, np.float32), blank(0, np.int32)
        tokens[:size] = ids[:size]
        targets[: size - 1], weights[: size - 1] = ids[1:size], 1
        if not closed and size == len(ids):  # EOS was not cut off
            weights[size - 2] = 0
        ends = start + np.flatnonzero(tokens[start:size] == tokenizer.delimiter_id)
        last = size if closed else (ends[-1] + 1 if len(ends) else start)
        behind = np.cumsum(np.isin(np.arange(start, last) - 1, ends))
        segments[:start], segments[start:last] = 1, 2 + behind
        return {
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
            "segments": segments,
            "label_positions": restarted(segments),
            "prompt": np.array(tokenizer.prompt(), np.int32),
        }


def make_formatter(*, max_label_bytes: int = 0, **fields: Any) -> Formatter:
    """The formatter of a recipe. Older recipes have `max_label_bytes`, which nothing needs now."""
    del max_label_bytes
    return config_lib.section(Formatter, fields, "formatter")


def restarted(segments: np.ndarray) -> np.ndarray:
    """Places of a row when labels restart; upstream: models/llama.py, decoupled positions.

    The prompt's last token counts to the first label. From the second label on a label's first
    token has its place:

        segment   1 1 1 2 2 3 3 3 0 0
        place     0 1 2 3 4 2 3 4 8 9
    """
    places = np.arange(len(segments), dtype=np.int32)
    answer = int((segments == 1).sum()) - 1
    for number in range(3, int(segments.max(initial=0)) + 1):
        own = segments == number
        places[own] = answer + np.arange(own.sum())
    return places


picture_of = images.of_record


def crop(image_u8: np.ndarray, side: int) -> np.ndarray:
    """CLIP's preprocessing on bytes: shorter side to `side`, then the middle.

    Any uint8 picture works: grey ones get three channels, a fourth is dropped. Rounding is the
    reference's (torchvision): the longer side down, the offset to the nearest even.

    Raises:
      BadRecordError: not uint8, or an empty picture.
    """
    image_u8 = np.asarray(image_u8)
    if image_u8.ndim == 2:
        image_u8 = image_u8[..., None]
    if image_u8.dtype != np.uint8 or image_u8.ndim != 3 or not image_u8.size:
        raise records.BadRecordError(
            f"a picture is {image_u8.dtype}{list(image_u8.shape)}, not uint8[H, W, 3]"
        )
    if image_u8.shape[2] < 3:  # grey, perhaps with transparency
        image_u8 = np.repeat(image_u8[..., :1], 3, axis=2)
    image_u8 = np.ascontiguousarray(image_u8[..., :3])
    image_u8 = _without_ends(image_u8)
    height, width = image_u8.shape[:2]
    short, long = min(height, width), max(height, width)
    longer = int(side * long / short)
    size = (side, longer) if height <= width else (longer, side)
    image_u8 = images.resize(image_u8, size)
    top, left = (round((n - side) / 2) for n in size)
    return image_u8[top : top + side, left : left + side]


def _without_ends(image_u8: np.ndarray) -> np.ndarray:
    """The middle of a strip; enlarging all of it could take gigabytes for pixels that are cut."""
    height, width = image_u8.shape[:2]
    most = _MAX_ASPECT * min(height, width)
    y, x = max(height - most, 0) // 2, max(width - most, 0) // 2
    return image_u8[y : y + most, x : x + most]
