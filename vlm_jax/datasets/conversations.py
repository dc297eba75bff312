"""Conversations about images with boxes, points and masks: a JSONL file that people write.

A line, of one image:

    {"image": "photos/dog.jpg",
     "messages": [
       {"role": "user", "content": "What is [0]?", "boxes": [[10, 20, 90, 80]]},
       {"role": "assistant", "content": "A dog [0], and its ball [1].",
        "boxes": [[10, 20, 90, 80], [5, 5, 15, 15]],
        "masks": [{"size": [100, 120], "counts": "..."}, null]}]}

`[0]`, `[1, 2]` in a content are places of that message, in pixels of the image: its "boxes" (x0,
y0, x1, y1), then its "points" (x, y; a box of two pixels around each). "masks" go with an
assistant's boxes in their order: COCO's run lengths, polygons [[x, y, x, y, ...], ...], or null.
Every place must be named in its message, so that none is lost without a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.data import records
from vlm_jax.datasets import image_lines

LOCATION = image_lines.LOCATION
_ROLES = ("user", "assistant")
_KEYS = {"role", "content", "boxes", "points", "masks"}


@dataclasses.dataclass
class Conversations(image_lines.ImageLines):
    """Random-access source of {"image": bytes, "turns", "boxes_px", "masks", "id"}.

    Args:
      path: of the JSONL; a file, glob, folder, or a list of these.
      root: folder that images start from; "" is that of the file.

    Raises:
      DataError: no such file.
    """

    def __getitem__(self, index: int) -> records.Record:
        line = self.line(index)
        made = turns_of(line)
        name = line.get("image")
        if not isinstance(name, str) or not name:
            raise records.BadRecordError(f"image is {name!r:.60}, not the path of a file")
        return {"image": self.content(name), "id": self.record_id(index), **made}


def make_source(**fields: Any) -> Conversations:
    """For `type="conversations"` in a config."""
    return Conversations(**fields)


def turns_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """{"turns", "boxes_px", "masks"} of a line; see the module.

    Raises:
      BadRecordError: what is wrong, with the number of the message.
    """
    messages = line.get("messages")
    if not isinstance(messages, list) or not messages:
        raise records.BadRecordError(f"messages is {messages!r:.60}, not a list of messages")
    turns, boxes, masks = [], [], []
    for number, message in enumerate(messages):
        where = f"message {number + 1}"
        if not isinstance(message, dict):
            raise records.BadRecordError(f"{where} is {message!r:.60}, not an object")
        if unknown := sorted(set(message) - _KEYS):
            raise records.BadRecordError(
                f"{where} has {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}"
            )
        role = _ROLES[number % 2]
        if message.get("role") != role:
            raise records.BadRecordError(
                f"{where} is of {message.get('role')!r:.40}; user and assistant take turns, user "
                f"first, so this one is the {role}'s"
            )
        text, found, said = _message(message, where, role)
        turns.append(text)
        boxes += found
        masks += said
    if len(turns) % 2:
        raise records.BadRecordError("the last message is the user's: there is no answer to learn")
    return {"turns": turns, "boxes_px": boxes, "masks": masks}


def _message(message, where, role):
    """(text with locations, boxes in the order of the text, masks of an assistant's)."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise records.BadRecordError(f"{where}: content is {content!r:.60}, not a text")
    boxes, points = (list(message.get(key) or ()) for key in ("boxes", "points"))
    places = [*boxes, *(_around(point, where) for point in points)]
    given = list(message.get("masks") or ())
    if given and role == "user":
        raise records.BadRecordError(f"{where}: masks are the assistant's; give a user's as a box")
    if len(given) > len(boxes):
        raise records.BadRecordError(f"{where}: {len(given)} masks and {len(boxes)} boxes")
    try:
        text, order = image_lines.named_places(content, len(places), "in its content", "places")
    except ValueError as error:
        raise records.BadRecordError(f"{where}: {error}") from error
    if LOCATION in content:
        raise records.BadRecordError(f"{where}: write [0] for a place, not {LOCATION!r}")
    if missing := sorted(set(range(len(places))) - set(order)):
        raise records.BadRecordError(f"{where}: its content does not name [{missing[0]}]")
    filled = [*given, *[None] * (len(places) - len(given))]
    masks = [filled[i] for i in order] if role == "assistant" else []
    return text, [places[i] for i in order], masks


def _around(point, where):
    """A point as a box of two pixels; what a network sees of it is one place either way."""
    try:
        x, y = map(float, point)
    except (TypeError, ValueError) as error:
        raise records.BadRecordError(f"{where}: the point {point!r:.40} is not [x, y]") from error
    return [x - 1, y - 1, x + 1, y + 1]
