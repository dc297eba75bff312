"""The evaluation of captions, on ones that are known."""

import json
import pathlib

import numpy as np
import pytest

from tests.evaluators import fakes
from vlm_jax import answer
from vlm_jax.data import records
from vlm_jax.evaluators import captions

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "nextchat" / "text_io.json"


def run(true, said, out_dir=None):
    hosts = [answer.Host(truth=answer.Answer(text=x), id=f"c{i}") for i, x in enumerate(true)]

    class Reader:
        def read(self, outputs, batch):
            return [answer.Answer(text=text) for text in said]

    evaluator = captions.Evaluator(predict="chat")
    batch = fakes.batch_of({"ids": np.arange(len(true))}, hosts)
    evaluator.check(batch)
    return fakes.run(evaluator, [batch], reader=Reader(), predict=lambda b: {}, out_dir=out_dir)


def test_the_reference_has_the_same_score(tmp_path):
    golden = json.loads(GOLDEN.read_text())["metric_regcap"]
    true = [text.rpartition("ASSISTANT: ")[2] for text in golden["targets"]]
    found = run(true, golden["preds"], tmp_path)
    assert 100 * found["cider"] == pytest.approx(golden["CIDEr"])
    assert found["cider_low"] < found["cider"] < found["cider_high"]
    assert found["other_cider"] < 0.5 < found["cider"]
    assert found["bleu_1"] > found["bleu_2"] > found["bleu_3"] > found["bleu_4"]
    assert 0 < found["rouge_l"] < 1 and found["empty"] == 0 and found["images"] == 8
    lines = [json.loads(x) for x in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert np.mean([line["cider"] for line in lines]) == pytest.approx(found["cider"])


def test_several_true_captions_and_nothing_said():
    found = run(["a red dog\nthe dog", "blue sky"], ["the dog", ""])
    assert found["rouge_l"] == 0.5 and found["empty"] == 0.5
    assert found["words"] == 1 and found["true_words"] == pytest.approx((3 + 2 + 2) / 3)


def test_an_image_without_a_true_caption():
    with pytest.raises(records.DataError, match="c1 has no true caption"):
        run(["a dog", " ."], ["a", "b"])
