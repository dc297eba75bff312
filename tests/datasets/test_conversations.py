"""People's own conversations: places in their order, masks with their boxes, mistakes by name."""

import json

import numpy as np
import pytest

from vlm_jax.data import images, records, sources
from vlm_jax.datasets import conversations

USER = {"role": "user", "content": "What is [0]?", "boxes": [[10, 20, 90, 80]]}
SAID = {
    "role": "assistant",
    "content": "A ball [1] of a dog [0], at [2].",
    "boxes": [[10, 20, 90, 80], [5, 5, 15, 15]],
    "points": [[50, 60]],
    "masks": [[[1, 1, 5, 1, 5, 5]]],
}


def test_places_come_in_the_order_of_the_text():
    made = conversations.turns_of({"messages": [USER, SAID]})
    at = conversations.LOCATION
    assert made["turns"] == [f"What is {at}?", f"A ball {at} of a dog {at}, at {at}."]
    first, second = [10, 20, 90, 80], [5, 5, 15, 15]
    assert made["boxes_px"] == [first, second, first, [49, 59, 51, 61]]
    assert made["masks"] == [None, [[1, 1, 5, 1, 5, 5]], None]


def test_several_at_once_and_brackets_that_are_none():
    said = {**SAID, "content": "They [0, 1] see [a] and [2].", "masks": None}
    made = conversations.turns_of({"messages": [USER, said]})
    at = conversations.LOCATION
    assert made["turns"][1] == f"They {at} {at} see [a] and {at}."


@pytest.mark.parametrize(
    "messages, message",
    [
        (None, "messages is None"),
        ([], r"messages is \[\]"),
        ([USER], "there is no answer to learn"),
        ([SAID, USER], "message 1 is of 'assistant'; user and assistant take turns"),
        ([USER, {**SAID, "role": "system"}], "message 2 is of 'system'"),
        ([USER, {**SAID, "content": ""}], "message 2: content is ''"),
        ([USER, {**SAID, "box": 1}], "message 2 has 'box'; known: boxes"),
        ([{**USER, "content": "What?"}, SAID], r"message 1: its content does not name \[0\]"),
        ([{**USER, "content": "[0] [1]"}, SAID], r"message 1: \[1\] in its content, and 1 places"),
        ([{**USER, "masks": [None]}, SAID], "message 1: masks are the assistant's"),
        ([USER, {**SAID, "masks": [None] * 3}], "message 2: 3 masks and 2 boxes"),
        ([USER, {**SAID, "points": [[1]]}], r"message 2: the point \[1\] is not"),
        ([USER, {**SAID, "content": "<at> <boxes> [0] [1] [2]"}], r"write \[0\] for a place"),
        ([7], "message 1 is 7, not an object"),
    ],
)
def test_mistakes_are_named(messages, message):
    with pytest.raises(records.BadRecordError, match=message):
        conversations.turns_of({"messages": messages})


def test_from_a_file(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dog.png").write_bytes(images.encode(image))
    lines = [
        {"image": "photos/dog.png", "messages": [USER, SAID]},
        {"image": "photos/gone.png", "messages": [USER, SAID]},
        {"image": 5, "messages": [USER, SAID]},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = sources.make_source("conversations", path=str(path), form="chat")
    assert len(source) == 3 and source.record_id(0).endswith("mine.jsonl:1")
    record = source[0]
    np.testing.assert_array_equal(images.of_record(record), image)
    assert record["form"] == "chat" and len(record["boxes_px"]) == 4
    with pytest.raises(records.BadRecordError, match="gone.png"):
        source[1]
    with pytest.raises(records.BadRecordError, match="image is 5"):
        source[2]
