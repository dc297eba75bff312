import json

import numpy as np
import pytest
from PIL import Image

from tests.evaluators import fakes
from vlm_jax.evaluators import context_perplexity


def rows(*sentences, length=8, valid=None):
    """Rows as the formatter makes them: ids in, next ids out, padded with zeros."""
    batch = {name: np.zeros((len(sentences), length), np.int32) for name in fakes.NAMES}
    for row, ids in enumerate(sentences):
        size = len(ids) - 1
        batch["tokens"][row, :size], batch["targets"][row, :size] = ids[:-1], ids[1:]
        batch["segments"][row, :size] = 1
        batch["positions"][row, :size] = np.arange(size)
    return fakes.batch_of(batch, valid=valid)


class Predict:
    """logp of a target is -(the number of real inputs up to it); keeps what it saw."""

    def __init__(self):
        self.seen = []

    def __call__(self, batch):
        self.seen.append(batch.arrays)
        count_bt = np.cumsum(batch.arrays["segments"] > 0, axis=1)
        return {"logp": -count_bt.astype(np.float32)}


def test_contexts_end_before_the_target(tmp_path):
    predict = Predict()
    evaluator = context_perplexity.Evaluator(tokens_per_image=2, max_context=2, lead_tokens=1)
    batch = rows([9, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6, 7, 8], [9, 1, 2, 3, 4])
    scores = fakes.run(evaluator, [batch], predict=predict, out_dir=tmp_path)
    one, two = predict.seen
    assert one["tokens"].shape == two["tokens"].shape == (3, 5)  # one compiled shape
    np.testing.assert_array_equal(one["tokens"][0], [3, 4, 5, 6, 0])  # 6 is padding, segment 0
    np.testing.assert_array_equal(one["targets"][0], [4, 5, 6, 0, 0])
    np.testing.assert_array_equal(one["weights"][0], [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(one["segments"][0], [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(two["tokens"][0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(two["tokens"][1], [3, 4, 5, 6, 7])  # the last images of a row
    np.testing.assert_array_equal(two["weights"][1], [0, 0, 0, 1, 1])
    # The scored targets follow 2 and 3 inputs, then 4 and 5.
    assert scores["context_01"] == pytest.approx(np.exp(2.5))
    assert scores["context_02"] == pytest.approx(np.exp(4.5))
    assert (scores["rows"], scores["left_out"]) == (2, 1)
    lines = (tmp_path / "context_perplexity.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"context": 2, "perplexity": pytest.approx(np.exp(4.5))}
    assert Image.open(tmp_path / "context_perplexity.png").width > 100


def test_the_lead_can_stay():
    predict = Predict()
    evaluator = context_perplexity.Evaluator(
        tokens_per_image=2, max_context=1, lead_tokens=1, keep_lead=True
    )
    scores = fakes.run(evaluator, [rows([9, 1, 2, 3, 4, 5, 6])], predict=predict)
    np.testing.assert_array_equal(predict.seen[0]["tokens"], [[9, 3, 4, 5]])
    np.testing.assert_array_equal(predict.seen[0]["weights"], [[0, 0, 1, 1]])
    assert scores["context_01"] == pytest.approx(np.exp(3.5))


def test_rows_are_averaged_as_perplexities():
    class TwoRows(Predict):
        def __call__(self, batch):
            super().__call__(batch)
            return {"logp": np.array([[-1.0] * 3, [-3.0] * 3])}

    evaluator = context_perplexity.Evaluator(tokens_per_image=2, max_context=1)
    scores = fakes.run(evaluator, [rows([1, 2, 3, 4], [1, 2, 3, 4])], predict=TwoRows())
    assert scores["context_01"] == pytest.approx((np.exp(1) + np.exp(3)) / 2)


def test_too_short():
    evaluator = context_perplexity.Evaluator(tokens_per_image=2, max_context=3)
    with pytest.raises(ValueError, match="none of 1 rows holds 4 images of 2 ids"):
        fakes.run(evaluator, [rows([1, 2, 3, 4])], predict=Predict())
    with pytest.raises(ValueError, match="at least 1"):
        context_perplexity.Evaluator(tokens_per_image=2, max_context=0)
