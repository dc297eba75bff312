"""Annotation files as conversations: the sentences and boxes of the reference's loaders."""

import json
import pathlib

import numpy as np
import pytest

from vlm_jax.data import geometry, images, records, sources
from vlm_jax.datasets import grounded_annotations as annotations

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "nextchat"
TEXTS = json.loads((GOLDEN / "text_io.json").read_text())
FORMS = {
    "rec": "rec", "reg": "region caption", "gc": "region caption", "flickr": "grounded caption",
    "caption": "caption", "vqav2": "vqa", "vqae": "vqa-e", "vqax": "vqa-x", "vcr_q-ra": "vcr",
    "v7w_b": "pointing", "gpt4gen_bc": "reasoning", "gpt4gen_c": "reasoning, words",
    "instruct": "chat", "pope": "yes or no",
}  # fmt: skip
CASES = [case for case in TEXTS["cases"] if case["mode"] == "train" and case["name"] in FORMS]
SIZES = {"a.png": (44, 60), "b.png": (58, 41), "c.png": (50, 50), "777.jpg": (36, 54)}


@pytest.mark.parametrize("case", CASES, ids=lambda x: f"{x['name']}{x['index']}")
def test_sentences_and_boxes_of_the_reference(case):
    line, form = case["raw_item"], FORMS[case["name"]]
    made = annotations.told(line, form, case["template"] or "<image>")
    image = "<im_start><im_patch>*16<im_end>"
    expected = [x["value"].replace(image, "<image>") for x in case["sentences"]]
    assert made["turns"] == expected
    name = next((line[key] for key in annotations._IMAGES if key in line), None)
    square = geometry.Square(SIZES[name or f"{line['image_id']}.jpg"])
    boxes, expected = square.boxes_in(made["boxes_px"]), np.array(case["loc_inputs"])
    if form == "pointing":  # candidates come in an order of their own
        pairs = zip(sorted(boxes[:-1].tolist()), sorted(expected[:-1].tolist()), strict=True)
        for found, wanted in pairs:
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        boxes, expected = boxes[-1:], expected[-1:]
    np.testing.assert_allclose(boxes, expected.reshape(-1, 4), atol=1e-6)


def test_questions_of_the_released_file():
    rec = annotations.TEMPLATES["rec"]
    assert len(rec) == len(set(rec)) == 60
    assert "<image> Where is <expr> in the image?" in rec and "<image> Find <expr>." in rec
    assert len(annotations.TEMPLATES["vqa-e"]) == 8 and len(annotations.TEMPLATES["reasoning"]) == 5
    assert set(annotations.TEMPLATES) == set(annotations.FORMS)


def test_from_a_file_in_two_forms(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (44, 60, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(images.encode(image))
    line = {"img_path": "a.png", "expression": "the kite", "bbox": [5, 7, 54, 39]}
    path = tmp_path / "refcoco.jsonl"
    path.write_text((json.dumps(line) + "\n") * 3)
    fields = dict(type="grounded_annotations", path=str(path))
    rec = sources.make_source(form="rec", **fields)
    caption = sources.make_source(form="region caption", **fields)
    assert len({rec[i]["turns"][0] for i in range(3)}) == 3  # another question for every line
    assert rec[1]["turns"] == rec[1]["turns"] and rec[0]["turns"][1] == "Answer: <at> <boxes> ."
    assert caption[0]["turns"][1] == "the kite" and caption[0]["form"] == "region caption"
    np.testing.assert_array_equal(images.of_record(rec[0]), image)
    own = tmp_path / "mine.json"
    own.write_text(json.dumps(["<image> Show me <expr>!"]))
    mine = sources.make_source(form="rec", templates=str(own), **fields)
    assert mine[2]["turns"][0] == "<image> Show me the kite!"
    own.write_text(json.dumps(["<image> Show me!"]))
    with pytest.raises(records.DataError, match="must have <expr> once"):
        sources.make_source(form="rec", templates=str(own), **fields)
    with pytest.raises(records.DataError, match="form='' is none of rec"):
        sources.make_source(**fields)


def test_masks_of_expressions():
    polygon = [[1.0, 1, 9, 1, 9, 9]]
    line = {"img_path": "a", "expressions": ["x", "y"], "bbox": [1, 1, 9, 9], "mask": polygon}
    made = annotations.told(line, "res", "<image> Where is <expr>?")
    assert made["turns"][0] == "<image> Where is x?" and made["masks"] == [polygon]


@pytest.mark.parametrize(
    "form, line, message",
    [
        ("rec", {"expression": "x"}, "KeyError: 'bbox'"),
        ("rec", {"expression": 5, "bbox": [1, 2, 3, 4]}, "5 is no text"),
        ("rec", {"expression": "x", "bbox": ["a"]}, "ValueError"),
        ("yes or no", {"text": "?", "label": "maybe"}, "neither yes nor no"),
        ("chat", {"conversations": [{"from": "gpt", "value": "x"}]}, "turn 1 is of 'gpt'"),
        ("pointing", {"question": "q", "candidates": [], "answer": [1]}, "none of the candidates"),
        ("grounded caption",
         {"sentence": "<ph_st>a<ph_ed>", "boxes_seq": [], "boxes": []}, "more marked phrases"),
        ("grounded caption",
         {"sentence": "a", "boxes_seq": [[0]], "boxes": [[1, 2, 3, 4]]}, "fewer marked phrases"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_told(form, line, message):
    with pytest.raises(records.BadRecordError, match=message):
        annotations.told(line, form, "<image> <question><expr>")
