"""Conversations as rows; the keys are those at the top of `task.py`.

A record:

    image       bytes of a file, or image_u8 uint8[H, W, 3]; see `data.images.of_record`
    turns       ["<image> Where is the dog?", "Answer: <at> <boxes> ."], user and assistant; without
                `<image>` it stands in front of the first
    boxes_px    x0, y0, x1, y1 in pixels of the image, one for every `<at> <boxes>`, in their order
    masks       optional: of the answers' locations in their order; None, {"size", "counts"} (COCO's
                run lengths), or polygons [[x, y, x, y, ...], ...]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax import answer
from vlm_jax.data import annotations as annotations_lib
from vlm_jax.data import geometry, images, records
from vlm_jax.program import config as config_lib
from vlm_jax.systems.nextchat import conversation, tokenization


@dataclasses.dataclass(frozen=True)
class Formatter:
    """Record -> row; see the module.

    Attributes:
      tokenizer: file of the language model, or "smollm2".
      image_size, patch_size: of the image tower, in pixels.
      sam_size: side of SAM's square; 0 makes no masks.
      max_tokens: places of a row.
      locations: slots for boxes of a row. masks: of those of its answers.
    """

    tokenizer: str = ""
    image_size: int = 336
    patch_size: int = 14
    sam_size: int = 0
    max_tokens: int = 1024
    locations: int = 16
    masks: int = 4

    needs = ("boxes", "box_valid")

    def __post_init__(self):
        config_lib.check_ranges(
            self,
            **dict.fromkeys(("image_size", "patch_size", "max_tokens", "locations", "masks"),
                            (1, 2**20)),
            sam_size=(0, 2**14),
        )  # fmt: skip
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )

    @property
    def num_image(self) -> int:
        """Vectors of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def words(self) -> tokenization.Tokenizer:
        """The tokenizer itself."""
        return tokenization.load(self.tokenizer)

    def __call__(self, record: Mapping[str, Any], rng: Any) -> dict[str, Any]:
        """A row.

        Raises:
          BadRecordError: what is wrong with the record, by name.
        """
        del rng
        image_u8 = images.of_record(record)
        square = geometry.Square(image_u8.shape[:2])
        turns = turns_of(record)
        try:
            boxes = square.boxes_in(record.get("boxes_px", ()))
        except ValueError as error:
            raise records.BadRecordError(f"boxes_px: {error}") from error
        if len(boxes) > self.locations:
            raise records.BadRecordError(
                f"{len(boxes)} locations, and formatter.locations is {self.locations}"
            )
        encoded = conversation.encode(turns, self.words, self.num_image, len(boxes))
        if len(encoded.ids) > self.max_tokens + 1:
            raise records.BadRecordError(
                f"the conversation has {len(encoded.ids)} tokens, and formatter.max_tokens is "
                f"{self.max_tokens}"
            )
        example = {
            "image_u8": square.image_in(image_u8, self.image_size),
            **self._text(encoded),
            "boxes": _filled(boxes, self.locations),
            "box_valid": np.arange(self.locations) < len(boxes),
        }
        if self.sam_size:
            example |= self._masks(record, encoded, square, image_u8)
        answers = _in_answers(encoded, self.words)
        example["host"] = answer.Host(
            truth=answer.Answer(
                text=turns[-1] if len(turns) % 2 == 0 else "",
                boxes_xyxy_px=square.boxes_out(boxes[answers]),
                masks=tuple(
                    annotations_lib.encode_rle(decoded_mask(one, square.size))
                    for one in (record.get("masks") or () if self.sam_size else ())
                    if one is not None
                ),
            ),
            size=square.size,
            images=(example["image_u8"],),
            caption=turns[0],
        )
        return example

    def _text(self, encoded):
        ids, learned = encoded.ids, encoded.learned
        count = len(ids) - 1
        tokens, targets = (np.zeros(self.max_tokens, np.int32) for _ in range(2))
        weights, valid = np.zeros(self.max_tokens, np.float32), np.zeros(self.max_tokens, bool)
        tokens[:count], targets[:count] = ids[:-1], ids[1:]
        weights[:count] = learned[1:]
        # Nobody reads 0, which is both padding and unknown: upstream masks by the id.
        valid[:count] = ids[:-1] != 0
        return dict(tokens=tokens, targets=targets, weights=weights, token_valid=valid)

    def _masks(self, record, encoded, square, image_u8):
        canvas_u8, place = square.canvas(image_u8, self.sam_size)
        masks = np.zeros((self.masks, self.sam_size, self.sam_size), np.uint8)
        valid = np.zeros(self.masks, bool)
        given, count = list(record.get("masks") or ()), int(_in_answers(encoded, self.words).sum())
        while given and given[-1] is None:
            given.pop()
        if len(given) > count:
            raise records.BadRecordError(f"{len(given)} masks, and {count} locations in answers")
        if len(given) > self.masks:
            raise records.BadRecordError(f"{len(given)} masks; formatter.masks is {self.masks}")
        for number, one in enumerate(given):
            if one is None:
                continue
            try:
                mask = decoded_mask(one, square.size)
            except (LookupError, TypeError, ValueError) as error:
                raise records.BadRecordError(f"mask {number}: {error}") from error
            masks[number] = square.mask_in(mask, self.sam_size)
            if not masks[number].any():
                raise records.BadRecordError(f"mask {number} is empty, or too small to be seen")
            valid[number] = True
        return dict(sam_u8=canvas_u8, sam_place=place, masks=masks, mask_valid=valid)

    def read(
        self, outputs: Mapping[str, np.ndarray], hosts: list[answer.Host]
    ) -> list[answer.Answer]:
        """Boxes, and masks where there are some, in pixels of the image as it was given.

        Of generated tokens the text too, as the model writes it; `problem` says what was cut off.
        """
        found = []
        for row, host in enumerate(hosts):
            square = geometry.Square(host.size)
            valid = np.asarray(outputs["box_valid"][row], bool)
            masks: Sequence[Any] = ()
            if "mask_logits" in outputs:
                logits = np.asarray(outputs["mask_logits"][row], np.float32)[valid]
                if self.sam_size:  # as large as SAM's square first, as upstream does
                    logits = [geometry.enlarged(x, self.sam_size) for x in logits]
                masks = [annotations_lib.encode_rle(square.mask_out(x)) for x in logits]
            boxes = square.boxes_out(np.asarray(outputs["boxes"][row])[valid])
            text, problem = self._said(outputs, row) if "tokens" in outputs else ("", "")
            found.append(
                answer.Answer(text=text, boxes_xyxy_px=boxes, masks=tuple(masks), problem=problem)
            )
        return found

    def _said(self, outputs, row):
        """(text, problem) of what was generated."""
        ids = np.asarray(outputs["tokens"][row])[: int(outputs["lengths"][row])].tolist()
        problems = []
        if not ids or ids[-1] != self.words.eos_id:
            problems.append(f"cut off after {len(ids)} tokens")
        if lost := int(outputs["lost"][row]):
            problems.append(f"{lost} locations more than there are slots")
        return self.words.decode(ids), "; ".join(problems)


def turns_of(record: Mapping[str, Any]) -> list[str]:
    """The turns, with the image in the first.

    Raises:
      BadRecordError: no list of texts.
    """
    turns = record.get("turns")
    if not isinstance(turns, list | tuple) or not all(isinstance(x, str) for x in turns):
        raise records.BadRecordError(f"turns is {turns!r:.60}, not a list of texts")
    turns = list(turns)
    if turns and conversation.IMAGE not in turns[0]:
        turns[0] = f"{conversation.IMAGE} {turns[0]}"
    return turns


def decoded_mask(value: Any, size: tuple[int, int]) -> np.ndarray:
    """bool[H, W] of run lengths or polygons.

    Raises:
      ValueError: of another size, or nothing that can be drawn.
    """
    if isinstance(value, Mapping):
        if tuple(value["size"]) != tuple(size):
            raise ValueError(f"a mask of {tuple(value['size'])}, an image of {size}")
        return annotations_lib.decode_rle(value["counts"], *size)
    return annotations_lib.fill(value, *size)


def _in_answers(encoded: conversation.Encoded, tokenizer) -> np.ndarray:
    """bool, of every location: whether it belongs to an answer."""
    return encoded.learned[encoded.ids == tokenizer.at_id]


def _filled(boxes: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([boxes, np.zeros((count - len(boxes), 4), np.float32)])


def make_formatter(**fields: Any) -> Formatter:
    """The formatter of `config.formatter`."""
    return config_lib.section(Formatter, fields, "formatter")
