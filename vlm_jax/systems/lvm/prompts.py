"""Prompts for evaluations: images in front, images to predict. Numpy only.

A record has `prompt` and `target`, lists of uint8[H, W, 3] of any size, or `prompt_ids` and
`target_ids`, int32[images, ids of one]. `target` may be missing: then images are only made.

The example, stacked to a batch (n context images, m targets, S the side of the tokenizer):

    key                      dtype[shape]          meaning
    prompt_u8, target_u8     uint8[n, S, S, 3]     stretched as the reference, black where missing
    prompt_ids, target_ids   int32[n, size]        instead of the pictures, from such records
    num_prompt, num_target   int32                 how many of them are there
    lead                     int32[L]              ids in front (BOS), or none
    host                     Host                  its images; the true ones are `truth.images`;
                                                   the size of the last input as it came; `output`;
                                                   class and fold as `tags`, -1 for none

`collate` makes of a batch what the predictors read, see `encode`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax import answer
from vlm_jax.data import images, records


@dataclasses.dataclass(frozen=True)
class Formatter:
    """See the module.

    Attributes:
      images: context images of a record, at most.
      targets: images to predict, at most; generation makes so many.
      side: pixels; 0 takes records of ids only.
      size: ids of an image.
      lead_ids: in front of every prompt.
      tokenizer: -> the `encoders.image_tokenizer.ImageTokenizer`; None where there are ids only.
    """

    images: int
    targets: int
    side: int
    size: int
    lead_ids: tuple[int, ...] = ()
    tokenizer: Callable[[], Any] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        if self.images < 1 or self.targets < 1:
            raise ValueError(f"images={self.images} and targets={self.targets} must be positive")

    needs = ("ids",)

    def __call__(self, record: Mapping[str, Any], rng: Any = None) -> dict[str, np.ndarray]:
        """One prompt.

        Raises:
          BadRecordError: no image, or more than fit.
        """
        example: dict[str, Any] = {"lead": np.array(self.lead_ids, np.int32)}
        last_size, shown = (0, 0), {"prompt": (), "target": ()}
        for key, room in (("prompt", self.images), ("target", self.targets)):
            if "prompt_ids" in record:
                ids = _whole_images(record.get(f"{key}_ids", ()), self.size)
                example[f"{key}_ids"], count = _fill(ids, room, key), len(ids)
            else:
                given = record.get(key, ())
                flat = isinstance(given, np.ndarray) and not given.ndim
                if flat or not isinstance(given, list | tuple | np.ndarray):
                    raise records.BadRecordError(f"{key} is {given!r:.60}, not a list of pictures")
                pictures = images.as_images(given, reach="files")
                if not self.side:
                    raise records.DataError("pictures need task.tokenizer; 'tiny' or a folder")
                small = [images.resize(picture, self.side) for picture in pictures]
                shown[key] = tuple(small)
                blank = np.zeros((0, self.side, self.side, 3), np.uint8)
                example[f"{key}_u8"] = _fill(np.stack(small) if small else blank, room, key)
                count = len(pictures)
                if key == "prompt" and pictures:
                    last_size = pictures[-1].shape[:2]
            example[f"num_{key}"] = np.int32(count)
        if not example["num_prompt"]:
            raise records.BadRecordError("the prompt is empty; LVM continues at least one image")
        tags = {}
        for key in ("label", "fold"):
            number = record.get(key, -1)
            if not isinstance(number, int | np.integer) or not -(2**31) <= number < 2**31:
                raise records.BadRecordError(f"{key} is {number!r:.60}, not an integer")
            tags[key] = int(number)
        example["host"] = answer.Host(
            truth=answer.Answer(images=tuple(map(images.to01, shown["target"]))),
            size=last_size,
            images=shown["prompt"],
            output=str(record.get("output", "")),
            tags=tags,
        )
        return example

    def collate(
        self, arrays: Mapping[str, np.ndarray], hosts: list[answer.Host], *, truth: bool
    ) -> tuple[dict[str, np.ndarray], list[answer.Host]]:
        """A batch as the predictors read it, see `encode`; the tokenizer runs once for it."""
        del truth  # the pictures are there already
        to_ids = self.tokenizer().encode_u8 if self.tokenizer and "prompt_u8" in arrays else None
        return encode(arrays, to_ids, self.size), hosts

    def read(
        self, outputs: Mapping[str, np.ndarray], hosts: list[answer.Host]
    ) -> list[answer.Answer]:
        """The images of ids int32[B, n, size] or int32[B, n * size]."""
        if self.tokenizer is None:
            raise records.DataError("ids become pictures by task.tokenizer; 'tiny' or a folder")
        return answers_of(outputs["ids"], self.tokenizer(), self.size)


def answers_of(ids: np.ndarray, tokenizer: Any, size: int) -> list[answer.Answer]:
    """Answers with the images of ids int32[B, n, size] or int32[B, n * size]."""
    ids = np.asarray(ids)
    images01 = tokenizer.decode(ids.reshape(-1, size))
    rows = images01.reshape(len(ids), -1, *images01.shape[1:])
    return [answer.Answer(images=tuple(row)) for row in rows]


def _whole_images(value: Any, size: int) -> np.ndarray:
    """int32[n, size] of integers."""
    try:
        ids = np.asarray(value)
    except ValueError as error:
        raise records.BadRecordError(f"ids: {error}") from error
    if ids.size % size or (ids.size and ids.dtype.kind not in "iu"):
        raise records.BadRecordError(
            f"ids of {ids.dtype}{list(ids.shape)} are not whole images of {size} integers"
        )
    return ids.astype(np.int32).reshape(-1, size)


def _fill(rows: np.ndarray, room: int, key: str) -> np.ndarray:
    if len(rows) > room:
        field = "images" if key == "prompt" else "targets"
        raise records.BadRecordError(f"{len(rows)} {key} images; formatter.{field} is {room}")
    return np.concatenate([rows, np.zeros((room - len(rows), *rows.shape[1:]), rows.dtype)])


def encode(
    batch: Mapping[str, Any], to_ids: Callable[[np.ndarray], np.ndarray], size: int
) -> dict[str, Any]:
    """A batch of prompts as ids.

    With lead ids l, context images A B and target C, two ids each; a shorter prompt is padded on
    the left of `prompt`, and on the right of the rows, where causality hides it:

        prompt         l A A B B                        prompt_valid   1 1 1 1 1
        tokens         l A A B B C                      segments       1 1 1 1 1 1
        targets        A A B B C C                      weights        0 0 0 0 1 1
        target_ids     [[C C]]                          positions      0 1 2 3 4 5

    and prompt_images bool[n], which of the context images are there.

    Args:
      batch: see the module.
      to_ids: uint8[N, S, S, 3] -> int32[N, size]; called once.
      size: ids of an image.
    """
    batch = dict(batch)
    pictures = {key: batch.pop(key) for key in ("prompt_u8", "target_u8") if key in batch}
    counts = {"prompt": batch.pop("num_prompt"), "target": batch.pop("num_target")}
    lead = batch.pop("lead")
    if pictures:
        _encode_pictures(batch, pictures, counts, to_ids, size)
    prompt_ids, target_ids = batch.pop("prompt_ids"), batch["target_ids"]
    rows, n = prompt_ids.shape[:2]
    m, length = target_ids.shape[1], lead.shape[1] + n * size
    total = length + m * size
    batch["prompt"] = np.zeros((rows, length), np.int32)
    batch["prompt_valid"] = np.ones((rows, length), bool)
    ids_bt, scored_bt = np.zeros((rows, total), np.int32), np.zeros((rows, total), bool)
    used_b = np.zeros(rows, int)
    for row in range(rows):
        context = np.concatenate([lead[row], prompt_ids[row, : counts["prompt"][row]].ravel()])
        target = target_ids[row, : counts["target"][row]].ravel()
        if len(context):
            batch["prompt"][row, -len(context) :] = context
            # A row that only fills the batch has no prompt; attending nowhere would give NaN.
            batch["prompt_valid"][row, : length - len(context)] = not counts["prompt"][row]
        used_b[row] = len(context) + len(target)
        ids_bt[row, : used_b[row]] = np.concatenate([context, target])
        scored_bt[row, len(context) : used_b[row]] = True
    places = np.arange(total - 1, dtype=np.int32)
    return batch | {
        "prompt_images": np.arange(n) < counts["prompt"][:, None],
        "tokens": ids_bt[:, :-1],
        "targets": ids_bt[:, 1:],
        "weights": scored_bt[:, 1:].astype(np.float32),
        "segments": (places < used_b[:, None] - 1).astype(np.int32),
        "positions": np.tile(places, (rows, 1)),
    }


def _encode_pictures(
    batch: dict[str, Any],
    pictures: Mapping[str, np.ndarray],
    counts: Mapping[str, np.ndarray],
    to_ids: Callable[[np.ndarray], np.ndarray],
    size: int,
) -> None:
    """Adds prompt_ids and target_ids of all pictures that are there."""
    there = {
        key: np.arange(pictures[f"{key}_u8"].shape[1]) < counts[key][:, None] for key in counts
    }
    found: Sequence[np.ndarray] = [pictures[f"{key}_u8"][there[key]] for key in counts]
    ids = to_ids(np.concatenate(found))
    for key, part in zip(counts, np.split(ids, [len(found[0])])):
        batch[f"{key}_ids"] = np.zeros((*there[key].shape, size), np.int32)
        batch[f"{key}_ids"][there[key]] = part
