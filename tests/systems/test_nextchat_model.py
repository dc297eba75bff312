"""The object with verbs: answers of the reference, turns, files, bad input, the command."""

import json

import numpy as np
import pytest

import vlm_jax
from tests.systems import nextchat_golden as golden
from vlm_jax import predict
from vlm_jax.data import annotations, images
from vlm_jax.systems import nextchat
from vlm_jax.systems.nextchat import tokenization

pytest.importorskip("sentencepiece")
IO, TEXTS = golden.io(), golden.texts()


@pytest.fixture(scope="module")
def model():
    tokenizer = tokenization.load(golden.FOLDER / "tokenizer.model")
    return nextchat.NextChat(golden.MASKS, golden.params(golden.MASKS), tokenizer)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "chat"
    model.save(folder)
    return folder


def test_the_answer_of_the_reference(model):
    said = model.chat(IO["image_a"], "Where is the dog?", max_tokens=20)
    assert said.text == TEXTS["responses"]["gen"]["shown"]
    golden.close(said.boxes_xyxy_px, IO["gen_boxes_pixels"])
    golden.close(said.scores, IO["gen_iou"][:, 0])
    for rle, expected in zip(said.masks, IO["gen_masks_pixels"], strict=True):
        assert (annotations.decode(rle) != (expected > 0)).mean() < 2e-3
    for span in said.spans:
        assert said.text[span.start : span.end] == f"[{span.index}]"
    assert [(x.kind, x.index) for x in said.spans] == [
        ("box", 0), ("mask", 0), ("box", 1), ("mask", 1)
    ]  # fmt: skip
    assert said.problem == "the answer was cut off after 20 tokens; raise max_tokens"


def test_regions_in_the_question(model):
    said = model.chat(
        IO["image_c"], "What are [0,1] doing?", boxes=IO["region_boxes_px"], max_tokens=16
    )
    golden.close(said.boxes_xyxy_px, IO["region_boxes_pixels"])
    # What the model says of its own tokens besides locations is not shown.
    response = TEXTS["responses"]["region"]["response"].replace("<at> <boxes>", "[0]")
    words = [x for x in response.split() if x not in ("<boxes>", "<im_end>")]
    assert said.text.split() == words


def test_turns_are_remembered_and_the_image_encoded_once(model, monkeypatch):
    talk, calls = model.conversation(IO["image_a"]), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda image: calls.append(1) or encode(image))
    first = talk.say("Where is the dog?", max_tokens=8)
    second = talk.say("What is [0]?", boxes=[[1, 2, 30, 40]], max_tokens=8)
    assert len(calls) == 1 and len(talk.turns) == 4
    alone = model.conversation(IO["image_a"]).say("What is [0]?", boxes=[[1, 2, 30, 40]],
                                                  max_tokens=8)  # fmt: skip
    assert second.text != alone.text  # what was said before is read
    again = model.conversation(IO["image_a"])
    assert again.say("Where is the dog?", max_tokens=8) == first
    assert again.say("What is [0]?", boxes=[[1, 2, 30, 40]], max_tokens=8) == second


def test_sampling_is_a_function_of_the_seed(model):
    options = dict(max_tokens=8, temperature=2.0)
    said = [model.chat(IO["image_a"], "Hello?", seed=seed, **options) for seed in (1, 1, 2)]
    assert said[0] == said[1] and said[0].text != said[2].text


@pytest.mark.parametrize(
    "text, fields, message",
    [
        ("  ", {}, "the question is empty"),
        ("Where is [0]?", {}, r"\[0\] in the question, and 0 boxes"),
        ("Where?", dict(boxes=[[1, 1, 5, 5]]), "the question names none"),
        ("What is [0]?", dict(boxes=[[5, 1, 1, 5]]), "ends before it begins"),
        ("What is [0]?", dict(boxes=[[500, 1, 600, 5]]), "outside of the image of 60 x 44"),
        ("What is <at> <boxes>?", {}, "the model's own tokens"),
        ("Where?", dict(max_tokens=0), "max_tokens=0"),
        ("Where?", dict(max_tokens=10_000), "the model's context is 1024"),
        ("Where?", dict(temperature=-1.0), "temperature -1.0"),
        ("dog " * 2000, {}, "begin a new conversation"),
    ],
)
def test_bad_questions(model, text, fields, message):
    talk = model.conversation(IO["image_a"])
    with pytest.raises(ValueError, match=message):
        talk.say(text, **fields)
    assert talk.turns == []


def test_bad_images(model):
    with pytest.raises(ValueError, match="no such file|cannot|not"):
        model.chat("nothing.jpg", "Where?")
    with pytest.raises(ValueError):
        model.chat(np.zeros((0, 4, 3), np.uint8), "Where?")


def test_saved_and_loaded(model, saved):
    loaded = vlm_jax.load("nextchat", str(saved))
    assert isinstance(loaded, nextchat.NextChat)
    expected = model.chat(IO["image_a"], "Where is the dog?", max_tokens=20)
    assert loaded.chat(IO["image_a"], "Where is the dog?", max_tokens=20) == expected
    other = tokenization.load(golden.FOLDER / "tokenizer.model")
    other.size += 1
    try:
        with pytest.raises(ValueError, match="406 ids with the five added ones, the decoder 405"):
            nextchat.NextChat(golden.MASKS, {}, other)
    finally:
        other.size -= 1


def test_from_the_command_line(saved, tmp_path, capsys, monkeypatch):
    for name in "ac":
        (tmp_path / f"{name}.png").write_bytes(images.encode(IO[f"image_{name}"]))
    (tmp_path / "b.png").write_bytes(b"no image")
    out = tmp_path / "out"
    command = ["nextchat", f"--checkpoint={saved}", f"--out={out}", "--max_tokens=20"]
    photos = [str(tmp_path / f"{name}.png") for name in "abc"]
    predict.main([*command, "--ask=Where is the dog?", "--image", *photos])
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [photos[0], photos[2]]
    assert lines[0]["text"] == TEXTS["responses"]["gen"]["shown"]
    golden.close(np.array(lines[0]["boxes_xyxy_px"], np.float32), IO["gen_boxes_pixels"])
    drawn = images.decode(out / lines[0]["picture"])
    assert drawn.shape == IO["image_a"].shape and (drawn != IO["image_a"]).mean() > 0.02
    assert "b.png" in (out / "answers.jsonl.failed").read_text()
    assert "1 of 3 images cannot be read" in capsys.readouterr().err

    said = iter(["Where is the dog?", "/box 1 2 30", "What is [0]?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    predict.main([*command, "--chat", "--image", photos[0]])
    seen = capsys.readouterr()
    assert TEXTS["responses"]["gen"]["shown"].split("\n")[0] in seen.out
    assert "boxes" in seen.err  # three numbers are no box
    assert images.decode(out / "turn_1.png").shape == IO["image_a"].shape
    with pytest.raises(SystemExit):
        predict.main([*command, "--image", photos[0]])
    assert "--ask TEXT" in capsys.readouterr().err
