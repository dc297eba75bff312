"""How far a score may be off for the examples that happened to be there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def bootstrap(
    values_ns: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentiles of a score over samples drawn with replacement (Efron, 1979).

    Args:
      values_ns: float[N, S], what every example adds to each of S sums; [N] is one.
      score: sums [draws, S] -> scores [draws]; None divides the first sum by the number of
        examples: a mean.
      level: share of the samples between the two ends.
      draws: samples.
      seed: of the draws; equal seeds give equal ends.

    Returns:
      (low, high); NaN without examples.
    """
    values_ns = np.asarray(values_ns, np.float64)
    values_ns = values_ns.reshape(len(values_ns), -1) if len(values_ns) else values_ns
    count = len(values_ns)
    if not count:
        return float("nan"), float("nan")
    # How often each example is drawn, so that no sample is held.
    rng, sums = np.random.default_rng(seed), []
    for _ in range(draws):
        times_n = np.bincount(rng.integers(count, size=count), minlength=count)
        sums.append(times_n @ values_ns)
    sums_ds = np.array(sums)
    scores_d = sums_ds[:, 0] / count if score is None else score(sums_ds)
    low, high = np.quantile(scores_d, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
