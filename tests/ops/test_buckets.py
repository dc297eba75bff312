"""Host arrays in pieces of few lengths."""

import numpy as np

from vlm_jax.ops import buckets


def test_lengths():
    assert [buckets.length(count, 12) for count in (0, 1, 2, 3, 5, 8, 9, 12)] == [
        1,
        1,
        2,
        4,
        8,
        8,
        12,
        12,
    ]
    assert [buckets.length(count, 90, 5) for count in (1, 5, 6, 10, 11, 41, 90)] == [
        5,
        5,
        10,
        10,
        20,
        80,
        90,
    ]
    assert buckets.length(3, 4, 5) == 4


def test_pieces_are_filled_with_copies_of_their_last_row():
    rows, names = np.arange(7), np.array(list("abcdefg"))
    found = [(a, n, x.tolist(), y.tolist()) for a, n, (x, y) in buckets.pieces(4, rows, names)]
    assert found == [
        (0, 4, [0, 1, 2, 3], ["a", "b", "c", "d"]),
        (4, 3, [4, 5, 6, 6], ["e", "f", "g", "g"]),
    ]
    assert list(buckets.pieces(4, rows[:0])) == []
