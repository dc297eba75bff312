"""Frechet distance between two sets of feature vectors, taken as Gaussians.

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

Heusel et al. 2017, arXiv 1706.08500, eq. 6. Only with the features of the Inception network is it
called FID; every other network gives other numbers and must be named.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Moments:
    """Mean and covariance of vectors that arrive in batches; float64, stable for long streams."""

    def __init__(self):
        self.count, self.mean, self._scatter = 0, 0.0, 0.0

    def add(self, features: np.ndarray) -> None:
        """More vectors, float[N, C]."""
        if not len(features):
            return
        x_nc = np.asarray(features, np.float64)
        mean = x_nc.mean(axis=0)
        centred = x_nc - mean
        self._merge(len(x_nc), mean, centred.T @ centred)

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        # Chan et al. 1979: what two parts scatter around their common mean.
        apart = mean - self.mean
        total = self.count + count
        between = np.outer(apart, apart) * (self.count * count / total)
        self._scatter = self._scatter + scatter + between
        self.mean = self.mean + apart * (count / total)
        self.count = total

    @property
    def state(self) -> np.ndarray:
        """float64[C * C + C + 1]: count, mean and scatter; empty when nothing was added."""
        if not self.count:
            return np.zeros(0)
        return np.concatenate([[float(self.count)], self.mean, np.ravel(self._scatter)])

    @property
    def covariance(self) -> np.ndarray:
        """float64[C, C], divided by count - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two vectors at least, there are {self.count}")
        return self._scatter / (self.count - 1)

    @property
    def is_singular(self) -> bool:
        """Whether there are too few vectors for a covariance of full rank.

        The distance then is too large, by an amount that depends on the count: such values compare
        only with values of equally many images.
        """
        return self.count <= np.size(self.mean)


def merged(states: Iterable[np.ndarray]) -> Moments:
    """The moments of all vectors, from the `state` of each part."""
    result = Moments()
    for state in states:
        if not len(state):
            continue
        size = int(round((np.sqrt(4 * len(state) - 3) - 1) / 2))  # C of C * C + C + 1
        result._merge(int(state[0]), state[1 : size + 1], state[size + 1 :].reshape(size, size))
    return result


def distance(a: Moments, b: Moments) -> float:
    """The distance; 0 for equal moments, up to rounding."""
    difference = a.mean - b.mean
    root = _root(a.covariance)
    # (cov_a cov_b)^(1/2) has the trace of the root of a symmetric matrix, which is always real.
    both = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(np.maximum(both, 0.0)).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross
    return float(difference @ difference + max(spread, 0.0))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
