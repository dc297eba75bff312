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

from vlm_jax.program import passes


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

    def run(self, data: passes.Pass) -> dict[str, float]:
        """Perplexities over one pass.

        Raises:
          ValueError: no row has a target.
        """
        lines, counts_v = [], np.zeros(self.num_ids)
        for batch in data.batches:
            logp_bt = data.predict(batch)["logp"].astype(np.float64)
            scored_bt = self._scored(batch)
            for row in np.flatnonzero(scored_bt.any(axis=1)).tolist():
                logp = logp_bt[row, scored_bt[row]]
                lines.append((int(batch.rows[row]), (float(logp.sum()), len(logp))))
            if self.baseline:
                counts_v = _more(counts_v, batch.arrays["targets"][scored_bt])
        rows = data.gather(lines)
        if not rows:
            raise ValueError("perplexity: no row has a target; are all loss weights zero?")
        sums, counts = (np.array([row[i] for row in rows]) for i in range(2))
        results = {
            "perplexity": np.exp(-sums / counts).mean(),
            "token_perplexity": np.exp(-sums.sum() / counts.sum()),
            "rows": len(rows),
        }
        if self.num_ids:
            results["uniform_perplexity"] = float(self.num_ids)
        if self.baseline:
            # Everybody's counts, as long as the longest.
            size = max(int(x[0]) for x in data.parts(np.array([float(len(counts_v))])))
            counts_v = data.add(np.pad(counts_v, (0, size - len(counts_v))))
            results["unigram_perplexity"] = self._unigram(data.other(self.baseline), counts_v)
        return results

    def _scored(self, batch: passes.Batch) -> np.ndarray:
        scored_bt = (batch.arrays["weights"] > 0) & batch.valid[:, None]
        if self.num_ids:
            scored_bt &= batch.arrays["targets"] < self.num_ids
        if self.last:
            after_bt = np.cumsum(scored_bt[:, ::-1], axis=1)[:, ::-1]
            scored_bt &= after_bt <= self.last
        return scored_bt

    def _unigram(self, batches: Any, scored_v: np.ndarray) -> float:
        """`scored_v`: how often each id is a target that is scored."""
        size = len(scored_v)
        counts = np.ones(size)
        for batch in batches:
            seen_bt = (batch.arrays["weights"] > 0) & batch.valid[:, None]
            seen = batch.arrays["targets"][seen_bt]
            counts += np.bincount(seen[seen < size], minlength=size)
        logp = np.log(counts / counts.sum())
        return float(np.exp(-(scored_v * logp).sum() / scored_v.sum()))


def _more(counts_v: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Counts of ids, longer where a larger id comes."""
    found_v = np.bincount(ids, minlength=len(counts_v)).astype(np.float64)
    found_v[: len(counts_v)] += counts_v
    return found_v
