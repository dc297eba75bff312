"""Frechet distance against numbers that can be worked out by hand."""

import numpy as np
import pytest

from vlm_jax.metrics import frechet


def moments(*batches):
    result = frechet.Moments()
    for batch in batches:
        result.add(np.asarray(batch))
    return result


def test_two_known_gaussians():
    # Means 0 and 3, variances 2 and 8: 9 + (sqrt(2) - sqrt(8))^2 = 9 + 2.
    a, b = moments([[-1.0], [1.0]]), moments([[1.0], [5.0]])
    assert frechet.distance(a, b) == pytest.approx(11.0)
    assert frechet.distance(b, a) == pytest.approx(11.0)
    # Independent axes add up; a rotation of both sets changes nothing.
    corners = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    stretched = corners * [2.0, 1.0] + [0.0, 5.0]
    variance = 4 / 3
    expected = 25 + (np.sqrt(4 * variance) - np.sqrt(variance)) ** 2
    assert frechet.distance(moments(corners), moments(stretched)) == pytest.approx(expected)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = frechet.distance(moments(corners @ turn), moments(stretched @ turn))
    assert turned == pytest.approx(expected)


def test_covariances_that_do_not_commute():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 3)), rng.normal(size=(200, 3)) @ rng.normal(size=(3, 3))
    first, second = moments(a), moments(b)
    product = np.linalg.eigvals(first.covariance @ second.covariance)
    spread = np.trace(first.covariance) + np.trace(second.covariance)
    expected = np.square(first.mean - second.mean).sum() + spread - 2 * np.sqrt(product).sum().real
    assert frechet.distance(first, second) == pytest.approx(expected)


def test_streams_give_the_moments_of_the_whole():
    x = np.random.default_rng(0).normal(size=(50, 7)) + 1e4
    parts = moments(x[:3], x[3:3], x[3:40], x[40:])
    assert parts.count == 50
    np.testing.assert_allclose(parts.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(parts.covariance, np.cov(x.T), rtol=1e-9, atol=1e-10)
    assert frechet.distance(parts, moments(x)) == pytest.approx(0, abs=1e-6)


def test_too_few_vectors_are_known():
    few = moments(np.eye(3))
    assert few.is_singular and not moments(np.random.default_rng(0).normal(size=(4, 3))).is_singular
    assert frechet.distance(few, few) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="there are 1"):
        frechet.distance(moments([[1.0]]), few)


def test_moments_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 3)), rng.normal(size=(50, 3)) + 1
    parts = [moments(x[:7]).state, moments().state, moments(x[7:9], x[9:]).state]
    whole, merged = moments(x), frechet.merged(parts)
    assert merged.count == 30
    np.testing.assert_allclose(merged.covariance, whole.covariance)
    other = moments(y)
    assert frechet.distance(merged, other) == pytest.approx(frechet.distance(whole, other))
