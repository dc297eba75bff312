"""A conversation as one text, and which of its tokens are learned.

    SYSTEM USER: <im_start><im_patch>...<im_end> Where is the dog? ASSISTANT: A: <at> <boxes> .</s>
                                                                              ~~~~~~~~~~~~~~~~~~~~~

The template of Vicuna 1.1. An answer and its `</s>` are learned; `<boxes>` is never a target, since
what follows `<at>` is known (`task.py` leaves it out). A location is written `<at> <boxes>`, in
questions (regions that are given) and in answers alike.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from vlm_jax.data import records
from vlm_jax.datasets import image_lines
from vlm_jax.systems.nextchat import tokenization

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = ("USER", "ASSISTANT")
LOCATION, IMAGE = image_lines.LOCATION, image_lines.IMAGE
_END = "</s>"
_TOKENS = re.compile(
    "|".join(map(re.escape, ("<im_patch>", "<im_start>", "<im_end>", _END, "<s>")))
)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as the network reads it.

    Attributes:
      ids: int32[T]. learned: bool[T], tokens that are targets.
    """

    ids: np.ndarray
    learned: np.ndarray


def image_text(num_image: int) -> str:
    """What stands for an image in the text of a turn."""
    return "<im_start>" + "<im_patch>" * num_image + "<im_end>"


def text(turns: Sequence[str], num_image: int) -> str:
    """The whole conversation; user first, then in turns; an odd number waits for an answer.

    Raises:
      BadRecordError: no turn, an image that is not in the user's first turn alone, or text that
        holds the model's own tokens.
    """
    if not turns:
        raise records.BadRecordError("a conversation without a turn")
    parts = [SYSTEM + " "]
    for number, turn in enumerate(turns):
        role = ROLES[number % 2]
        if not turn.strip():
            raise records.BadRecordError(f"turn {number + 1} ({role}) is empty")
        if found := _TOKENS.search(turn):
            raise records.BadRecordError(
                f"turn {number + 1} ({role}) holds {found.group()!r}, the model's own token"
            )
        if turn.count(IMAGE) > (number == 0):
            raise records.BadRecordError(
                f"turn {number + 1} ({role}) holds {IMAGE}: a conversation has one image, in its "
                "first turn"
            )
        turn = turn.replace(IMAGE, image_text(num_image))
        parts.append(f"{role}: {turn}" + (" " if number % 2 == 0 else _END))
    if len(turns) % 2:
        parts.append(f"{ROLES[1]}:")
    return "".join(parts)


def encode(
    turns: Sequence[str], tokenizer: tokenization.Tokenizer, num_image: int, num_boxes: int | None
) -> Encoded:
    """Ids of a conversation.

    Args:
      turns: user and assistant in turns; `<image>` in the first stands for the image.
      tokenizer, num_image: of the model.
      num_boxes: locations that are known, in the order of the text; None does not compare.

    Raises:
      BadRecordError: as `text`; locations and boxes of different numbers; `<at>` and `<boxes>`
        that do not stand together; nothing to learn in a whole conversation.
    """
    whole = text(turns, num_image)
    ids = np.array(tokenizer.encode(whole), np.int32)
    learned = np.zeros(len(ids), bool)
    # Where every answer begins and ends: the ids in front of a place are those of the text up to
    # it, which is looked at and not assumed.
    place = len(SYSTEM) + 1
    for number, turn in enumerate(turns):
        turn = turn.replace(IMAGE, image_text(num_image))
        if number % 2:
            start = place + len(f"{ROLES[1]}:")
            end = place + len(f"{ROLES[1]}: {turn}{_END}")
            first, last = (_count(whole[:x], tokenizer, ids) for x in (start, end))
            learned[first:last] = True
            place = end
        else:
            place += len(f"{ROLES[0]}: {turn} ")
    _check_locations(ids, tokenizer, num_boxes)
    if len(turns) > 1 and not learned.any():
        raise records.BadRecordError("no token of the conversation would be learned")
    return Encoded(ids, learned)


def _count(beginning: str, tokenizer, ids: np.ndarray) -> int:
    found = tokenizer.encode(beginning)
    if found != ids[: len(found)].tolist():
        raise records.BadRecordError(
            f"the tokenizer joins what stands on both sides of {beginning[-30:]!r}, so that it "
            "cannot be said which tokens belong to the answer"
        )
    return len(found)


def _check_locations(ids, tokenizer, num_boxes):
    at, boxes = (np.flatnonzero(ids == x) for x in (tokenizer.at_id, tokenizer.boxes_id))
    if len(at) != len(boxes) or np.any(at + 1 != boxes):
        raise records.BadRecordError(
            f"{len(at)} <at> and {len(boxes)} <boxes>: a location is written {LOCATION!r}"
        )
    if num_boxes is not None and len(at) != num_boxes:
        raise records.BadRecordError(f"{len(at)} locations in the text, and {num_boxes} boxes")


def regions(text: str, count: int) -> tuple[str, list[int]]:
    """`[0]` and `[1, 2]` of a question as locations, and which boxes they are, in order.

    Args:
      text: of a user.
      count: boxes that are given.

    Raises:
      ValueError: a number without a box.
    """
    return image_lines.named_places(text, count, "in the question", "boxes")
