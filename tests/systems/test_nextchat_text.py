"""Ids, which of them are learned, and regions, against the reference's."""

import json
import pathlib

import numpy as np
import pytest

from vlm_jax.data import records
from vlm_jax.systems.nextchat import conversation, tokenization

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "nextchat"
TEXTS = json.loads((GOLDEN / "text_io.json").read_text())
P = 16


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("sentencepiece")
    return tokenization.load(GOLDEN / "tokenizer.model")


@pytest.mark.parametrize("case", TEXTS["tokenizer_cases"], ids=lambda x: repr(x["text"][:20]))
def test_ids_of_the_reference(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids_with_bos"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_special_ids(tokenizer):
    assert tokenizer.added == TEXTS["special_token_ids"] and tokenizer.size == TEXTS["vocab_size"]


def turns_of(case):
    """The sentences of a case; those of the image as `<image>`."""
    image = f"<im_start><im_patch>*{P}<im_end>"
    return [x["value"].replace(image, "<image>") for x in case["sentences"]]


CASES = [case for case in TEXTS["cases"] if case["mode"] == "train"]


@pytest.mark.parametrize("case", CASES, ids=lambda x: f"{x['name']}{x['index']}")
def test_conversations_of_the_reference(tokenizer, case):
    made = conversation.encode(turns_of(case), tokenizer, P, len(case["loc_inputs"] or ()))
    assert made.ids.tolist() == case["input_ids"]
    expected = np.array(case["labels"]) != -100
    assert not (expected & ~made.learned).any()
    # Upstream counts the tokens of every round by itself. From the second on, this tokenizer writes
    # one more there ("▁" before "USER"; the released one does not), and one token is not learned.
    missed = np.flatnonzero(made.learned & ~expected)
    starts = np.flatnonzero(made.learned & ~np.roll(made.learned, 1))
    assert missed.tolist() == starts[1:].tolist()


def test_a_conversation_that_waits_for_an_answer(tokenizer):
    made = conversation.encode(["<image> Where is it?"], tokenizer, 2, 0)
    assert not made.learned.any()
    assert tokenizer.decode(made.ids).endswith("Where is it? ASSISTANT:")
    several = conversation.encode(
        ["<image> What is <at> <boxes>?", "a dog", "And where is the cat?"], tokenizer, 2, 1
    )
    assert tokenizer.decode(several.ids[several.learned]) == "a dog"
    assert several.ids[several.learned][-1] == tokenizer.eos_id


@pytest.mark.parametrize("case", TEXTS["parse_boxes_cases"], ids=lambda x: x["text"])
def test_regions_of_the_reference(case):
    expected, sequences = case["out"]
    found, numbers = conversation.regions(case["text"], 9)
    # Upstream writes a list of several as one location first and copies it later.
    copies = sum(len(x) - 1 for x in sequences)
    assert found.count("<at>") - expected.count("<at>") == copies
    assert numbers == [number for sequence in sequences for number in sequence]


@pytest.mark.parametrize(
    "turns, boxes, message",
    [
        ([], 0, "without a turn"),
        (["<image> a", " "], 0, r"turn 2 \(ASSISTANT\) is empty"),
        (["a", "<image>"], 0, "one image, in its first turn"),
        (["<image> <image>"], 0, "one image"),
        (["a </s> b"], 0, "the model's own token"),
        (["<im_patch>"], 0, "the model's own token"),
        (["what is <at> <boxes>?"], 0, "1 locations in the text, and 0 boxes"),
        (["what is this?"], 1, "0 locations in the text, and 1 boxes"),
        (["what is <at>?"], 1, "1 <at> and 0 <boxes>"),
        (["what is <boxes> <at>?"], 1, "a location is written"),
    ],
)
def test_bad_conversations(tokenizer, turns, boxes, message):
    with pytest.raises(records.BadRecordError, match=message):
        conversation.encode(turns, tokenizer, 2, boxes)


def test_a_region_without_a_box():
    with pytest.raises(ValueError, match=r"\[2\] in the question, and 2 boxes"):
        conversation.regions("compare [0] and [2]", 2)
