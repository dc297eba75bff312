"""Intervals: wide for few examples, narrow for many, the same for the same seed."""

import numpy as np
import pytest

from vlm_jax.metrics import intervals


def test_ends_of_a_share():
    """Of a share p of n, the deviation is sqrt(p (1 - p) / n)."""
    for n in (100, 2500):
        hits = np.arange(n) % 4 == 0
        low, high = intervals.bootstrap(hits)
        half = 1.96 * (0.25 * 0.75 / n) ** 0.5
        assert low < 0.25 < high
        assert (high - low) / 2 == pytest.approx(half, rel=0.15)
        assert intervals.bootstrap(hits) == (low, high)


def test_a_quotient_of_sums():
    pairs = np.array([[1, 2], [3, 4], [0, 10]])
    low, high = intervals.bootstrap(pairs, lambda sums: sums[:, 0] / sums[:, 1])
    assert low == 0 and high == pytest.approx(0.75)  # of one pair three times


def test_one_and_no_example():
    assert intervals.bootstrap([0.5]) == (0.5, 0.5)
    assert np.isnan(intervals.bootstrap([])).all()
