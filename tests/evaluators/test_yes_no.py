"""Yes and no: the reference's cases, and by hand."""

import json
import pathlib

import numpy as np
import pytest

from tests.evaluators import fakes
from vlm_jax import answer
from vlm_jax.data import records
from vlm_jax.evaluators import yes_no as evaluator_lib
from vlm_jax.metrics import yes_no

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "nextchat" / "text_io.json"


def test_texts_and_scores_of_the_reference():
    golden = json.loads(GOLDEN.read_text())["metric_pope"]
    assert [yes_no.stated(text) for text in golden["preds"]] == golden["extracted_preds"]
    assert [yes_no.stated(text) for text in golden["targets"]] == golden["extracted_targets"]
    said, true = (
        np.array([yes_no.stated(text) != "no" for text in golden[key]])
        for key in ("preds", "targets")
    )
    found = yes_no.scores(said, true)
    for key in ("accuracy", "precision", "recall", "f1"):
        assert found[key] == pytest.approx(golden["result"][key])
    assert found["yes_rate"] == golden["result"]["yes_ratio"]


@pytest.mark.parametrize("text, stated, first", [
    ("The answer is no .", "no", "no"),
    ("Yes, there is.", "no", "yes"),  # capitals: as published
    ("I do not know", "no", ""),
    ("yesterday", "yes", ""),
    ("USER: x ASSISTANT: The Answer Is NO.", "no", "no"),
    ("USER: yes? ASSISTANT: Yes", "yes", "yes"),
])  # fmt: skip
def test_what_a_text_says(text, stated, first):
    assert yes_no.stated(text) == stated
    assert yes_no.first_word(text.rpartition("ASSISTANT: ")[2]) == first


def test_never_a_yes():
    found = yes_no.scores([False, False], [True, False])
    assert found == dict(accuracy=0.5, precision=0, recall=0, f1=0, yes_rate=0)


def run(true, said, out_dir=None):
    hosts = [answer.Host(truth=answer.Answer(text=x), id=f"q{i}", caption="Is there a dog?")
             for i, x in enumerate(true)]  # fmt: skip

    class Reader:
        def read(self, outputs, batch):
            return [answer.Answer(text=text) for text in said]

    evaluator = evaluator_lib.Evaluator(predict="chat")
    batch = fakes.batch_of({"ids": np.arange(len(true))}, hosts)
    evaluator.check(batch)
    return fakes.run(evaluator, [batch], reader=Reader(), predict=lambda b: {}, out_dir=out_dir)


def test_an_evaluation(tmp_path):
    true = ["yes", "The answer is no .", "yes", "no"]
    said = ["The answer is yes.", "no", "Yes.", "perhaps"]
    found = run(true, said, tmp_path)
    assert found["accuracy"] == found["accuracy_first_word"] == 0.75
    assert found["precision"] == 1 and found["recall"] == 0.5 and found["yes_rate"] == 0.25
    assert found["unclear"] == 0.25 and found["always_yes_accuracy"] == 0.5
    assert found["accuracy_low"] <= 0.75 <= found["accuracy_high"] and found["questions"] == 4
    lines = [json.loads(x) for x in (tmp_path / "yes_no.jsonl").read_text().splitlines()]
    assert lines[1] == {"id": "q1", "question": "Is there a dog?", "true": "no", "answer": "no"}


def test_other_truths_are_refused():
    with pytest.raises(records.DataError, match="the true answer of q1 is 'a dog', neither yes"):
        run(["yes", "a dog"], ["yes", "yes"])
