"""The published table is complete and keeps to its definition."""

import pytest

from vlm_jax.systems.nxtp import published_labels


def test_rows_by_number_of_labels_and_embedding():
    methods = [row.method for row in published_labels.rows("coco", 10, "minilm")]
    assert len(methods) == 14 and methods[-1] == "NXTP, G70M checkpoint"
    assert len(published_labels.rows("cc3m", 100, "minilm")) == 3
    (clip,) = published_labels.rows("openimages", 10, "clip")
    assert clip.scores["openimages"] == (0.881, 0.838, 0.858)
    (imagenet,) = published_labels.rows("imagenet", 10, "minilm")
    assert imagenet.scores == {"imagenet": (0.896, 0.432, 0.574)}
    with pytest.raises(ValueError, match="no published scores of 'coco_valid'"):
        published_labels.rows("coco_valid", 10, "minilm")


def test_f1_is_near_that_of_the_means():
    for row in published_labels.ROWS:
        for recall, precision, f1 in row.scores.values():
            # The mean of F1 over images is below the F1 of the means.
            assert (
                2 * recall * precision / (recall + precision) - 0.06
                < f1
                < 1.003 * max(recall, precision)
            )
