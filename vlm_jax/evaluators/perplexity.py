"""Perplexity of held-out tokens, beside the perplexity of guessing.

Protocol of LVM (log-softmax over the whole vocabulary, only targets are scored): a row's
perplexity is exp(mean negative log-likelihood of its targets), the result is the arithmetic mean
over rows. `token_perplexity`, exp of the mean over all targets, is printed too: it is what compares
with the baselines, which know nothing of rows:

    uniform   every id below `num_ids` equally likely: num_ids
    unigram   the id frequencies of the training data, every count raised by one
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass
class Evaluator:
    """See the module.

    Attributes:
      predict: a predictor that gives `logp` float32[B, T], the log-probability of each target.
      num_ids: only targets below this id are scored (visual ids, not BOS and EOS); 0 scores all.
      last: only the last so many scored targets of a row, for example those of its last image;
        0 takes all.
      baseline: `DataConfig` fields of the training data, for the unigram; empty leaves it out.
    """

    predict: str = "score"
    num_ids: int = 0
    last: int = 0
    baseline: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    needs = ("logp",)
    baselines = dict.fromkeys(("uniform_perplexity", "unigram_perplexity"), "token_perplexity")

    def run(self, *, task, predict, batches, read, out_dir) -> dict[str, float]:
        """Perplexities over one pass.

        Raises:
          ValueError: no row has a target.
        """
        rows, total, scored_ids = [], 0.0, []
        for batch in batches:
            logp_bt = predict(batch)["logp"].astype(np.float64)
            scored_bt = self._scored(batch)
            for logp_t, targets_t, scored_t in zip(logp_bt, batch["targets"], scored_bt):
                if scored_t.any():
                    rows.append(-logp_t[scored_t].mean())
                    total -= logp_t[scored_t].sum()
                    scored_ids.append(targets_t[scored_t])
        if not rows:
            raise ValueError("perplexity: no row has a target; are all loss weights zero?")
        ids = np.concatenate(scored_ids)
        results = {
            "perplexity": np.exp(rows).mean(),
            "token_perplexity": np.exp(total / len(ids)),
            "rows": len(rows),
        }
        if self.num_ids:
            results["uniform_perplexity"] = float(self.num_ids)
        if self.baseline:
            results["unigram_perplexity"] = self._unigram(read(self.baseline), ids)
        return results

    def _scored(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        scored_bt = (batch["weights"] > 0) & batch["valid"][:, None]
        if self.num_ids:
            scored_bt &= batch["targets"] < self.num_ids
        if self.last:
            after_bt = np.cumsum(scored_bt[:, ::-1], axis=1)[:, ::-1]
            scored_bt &= after_bt <= self.last
        return scored_bt

    def _unigram(self, batches: Any, ids: np.ndarray) -> float:
        size = max(self.num_ids, int(ids.max()) + 1)
        counts = np.ones(size)
        for batch in batches:
            seen_bt = (batch["weights"] > 0) & batch["valid"][:, None]
            seen = batch["targets"][seen_bt]
            counts += np.bincount(seen[seen < size], minlength=size)
        logp = np.log(counts / counts.sum())
        return float(np.exp(-logp[ids].mean()))
