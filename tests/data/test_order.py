import numpy as np
import pytest

from vlm_jax.data import order


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000])
def test_permutations_are_permutations(length):
    for key in range(3):
        found = order.permute(np.arange(length), length, key)
        assert sorted(found.tolist()) == list(range(length))


def test_permutation_never_changes():
    # A run that resumes under another version must read the same records: do not edit.
    assert order.permute(np.arange(7), 7, 0).tolist() == [5, 0, 6, 2, 4, 1, 3]
    assert order.permute(np.arange(7), 7, 1).tolist() == [1, 2, 0, 4, 3, 6, 5]


def test_permutation_at_single_places_and_large_lengths():
    whole = order.permute(np.arange(1000), 1000, 9)
    assert [int(order.permute(np.array(i), 1000, 9)) for i in (0, 17, 999)] == whole[
        [0, 17, 999]
    ].tolist()
    huge = order.permute(np.arange(1000), 2**40 + 1, 3)
    assert len(set(huge.tolist())) == 1000 and huge.max() > 2**39


def test_permutation_looks_random():
    where = np.array([order.permute(np.array([0]), 10, key)[0] for key in range(3000)])
    counts = np.bincount(where, minlength=10)
    assert counts.min() > 220 and counts.max() < 380  # 300 each; 4.6 standard deviations


def test_shuffle_draws_a_fresh_permutation_per_epoch():
    shuffle = order.Shuffle(50, seed=0, name="a")
    epochs, indices = shuffle.locate(np.arange(150))
    assert epochs.tolist() == [0] * 50 + [1] * 50 + [2] * 50
    passes = indices.reshape(3, 50)
    assert all(sorted(one) == list(range(50)) for one in passes.tolist())
    assert (passes[0] != passes[1]).any() and (passes[1] != passes[2]).any()
    np.testing.assert_array_equal(shuffle.of_epoch(1), passes[1])
    other = order.Shuffle(50, seed=1, name="a").of_epoch(0)
    assert (other != passes[0]).any()


def test_places_far_apart_are_found_as_places_together():
    shuffle = order.Shuffle(10_001, seed=4, name="a")
    expected = order.permute(np.arange(10_001), 10_001, shuffle._key(0))
    scattered = np.array([0, 10_000, 4095, 4096, 17, 8192, 8191])
    assert shuffle.locate(scattered)[1].tolist() == expected[scattered].tolist()
    np.testing.assert_array_equal(shuffle.of_epoch(0), expected)
    later = shuffle.locate(scattered + 10_001)
    assert set(later[0].tolist()) == {1}
    np.testing.assert_array_equal(later[1], shuffle.of_epoch(1)[scattered])


def test_file_order_wraps_around():
    shuffle = order.Shuffle(3, seed=0, name="a", enabled=False)
    assert shuffle.locate(np.arange(7))[1].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_mixture_deals_evenly():
    mixture = order.Mixture({"b": 1.0, "a": 3.0})
    dealt = [mixture.locate(position) for position in range(8)]
    assert dealt == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("a", 2),
        ("a", 3),
        ("a", 4),
        ("b", 1),
        ("a", 5),
    ]


def test_mixture_meets_its_weights_and_skips_nothing():
    weights = {"x": 0.615, "y": 0.3, "z": 0.085}
    mixture = order.Mixture(weights)
    dealt = [mixture.locate(position) for position in range(5000)]
    for name, weight in weights.items():
        ranks = [rank for owner, rank in dealt if owner == name]
        assert ranks == list(range(len(ranks)))
        assert abs(len(ranks) / 5000 - weight) < 1e-3
    reordered = order.Mixture(dict(reversed(weights.items())))
    assert [reordered.locate(p) for p in range(50)] == dealt[:50]


def test_small_shares_are_met():
    weights = {"most": 1.0, "rare": 1.5e-6, "some": 2.5e-4, "third": 1 / 3}
    mixture = order.Mixture(weights)
    total, horizon = sum(weights.values()), 40_000_000
    # The ranks of the last positions say how many of each came before.
    owner, rank = mixture.deal(np.arange(horizon - 3_000_000, horizon))
    for place, name in enumerate(mixture.names):
        share = weights[name] / total
        assert rank[owner == place].max() + 1 == pytest.approx(share * horizon, rel=0.05)
        ranks = rank[owner == place]
        assert (np.diff(ranks) == 1).all()  # none is skipped or dealt twice
    exact = order.Mixture({"a": 999_999, "b": 1})
    assert (exact.deal(np.arange(7 * 10**6))[0] == 1).sum() == 7


def test_patterns_that_a_thousand_places_hold_stay():
    """So that runs of older versions go on in their order."""
    mixture = order.Mixture({"x": 0.615, "y": 0.3, "z": 0.085})
    assert len(mixture._owner) == 200


def test_shares_that_are_too_small():
    with pytest.raises(ValueError, match="'b' has a share of 5e-07"):
        order.Mixture({"a": 1.0, "b": 5e-7})
