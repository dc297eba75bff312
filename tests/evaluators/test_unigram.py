"""The unigram beside perplexity: counts of ids, wherever they were read."""

import numpy as np

from tests.evaluators import fakes
from vlm_jax.evaluators import few_shot, perplexity


def rows(targets, weights=None):
    targets = np.array(targets)
    arrays = {"targets": targets, "weights": np.ones(targets.shape)}
    return fakes.batch_of({**arrays, **({} if weights is None else {"weights": weights})})


def test_unigram_by_hand():
    scored = [rows([[1, 2], [2, 7]]), rows([[2, 2]])]
    train = [rows([[2, 2, 2, 1, 300]])]  # 300 is never scored
    for num_ids in (0, 9):
        evaluator = perplexity.Evaluator(num_ids=num_ids, baseline={"mixture": {}})
        found = fakes.run(
            evaluator,
            scored,
            other=train,
            predict=lambda batch: {"logp": np.full(batch.arrays["targets"].shape, -1.0)},
        )
        size = num_ids or 8
        counts = np.ones(size) + np.bincount([2, 2, 2, 1], minlength=size)
        logp = np.log(counts / counts.sum())
        want = np.exp(-np.mean([logp[i] for i in (1, 2, 2, 7, 2, 2)]))
        np.testing.assert_allclose(found["unigram_perplexity"], want, rtol=1e-12)


def test_lines_without_class_or_fold():
    found = few_shot.summary([{"id": "a", "iou": 0.5}, {"id": "b", "iou": 1.0}])
    assert found == {"iou": 0.75, "images": 2.0}
    tagged = [{"id": "a", "group": 3, "iou": 0.5}, {"id": "b", "iou": 1.0}]
    assert few_shot.summary(tagged, ["iou"]) == found  # a tag is no score
