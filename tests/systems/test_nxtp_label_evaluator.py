"""The label evaluator with a task whose answers are known."""

import collections
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluators import fakes
from vlm_jax import answer
from vlm_jax.data import images
from vlm_jax.encoders import text_embedder
from vlm_jax.program import config as config_lib
from vlm_jax.program import evaluate, sharding
from vlm_jax.systems.nxtp.evaluators import label_match

WORDS = {"dog": 0, "puppy": 30, "cat": 60, "car": 90, "sky": 90, "": 180}  # degrees
COS30 = np.cos(np.pi / 6)


class Reader:
    """Outputs hold per row the places in `answers`, a list of (label, score) per image.

    Places are in the order of first tokens; answers are ranked by score.
    """

    def __init__(self, answers):
        self._answers = answers

    def read(self, outputs, batch):
        return [
            answer.Answer(
                labels=sorted((self._answers[i][j] for i, j in row), key=lambda pair: -pair[1])
            )
            for row in outputs["places"].tolist()
        ]


def batch_of(*rows, references, valid=None):
    hosts = [
        answer.Host(
            truth=answer.Answer(labels=tuple((label, 1.0) for label in references[row])),
            id=f"photo{row}",
            images=(np.full((20, 20, 3), 10 * row, np.uint8),),
        )
        for row in rows
    ]
    return fakes.batch_of({"rows": np.array(rows)}, hosts, valid=valid)


@pytest.fixture(autouse=True)
def embedder(monkeypatch):
    def embed(words):
        angles = np.deg2rad([WORDS[word] for word in words])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    monkeypatch.setattr(text_embedder, "load", lambda name: embed)


def run(evaluator, answers, batches, out_dir=None, train=()):
    k = evaluator.options["k"]

    def predict(batch):
        return {"places": np.array([[(i, j) for j in range(k)] for i in batch.arrays["rows"]])}

    return fakes.run(
        evaluator, batches, reader=Reader(answers), predict=predict, out_dir=out_dir, other=train
    )


# Image 0: first tokens say "car", full probabilities "dog".
ANSWERS = [[("car", 0.2), ("dog", 0.5)], [("sky", 0.9), ("cat", 0.1)], [("dog", 0.5), ("car", 0.4)]]
REFERENCES = [["puppy"], ["sky"], []]


def photos(*rows, **fields):
    return batch_of(*rows, references=REFERENCES, **fields)


def evaluator(**fields):
    return label_match.Evaluator(k=2, ks=(1,), photos=2, **fields)


def test_numbers_by_hand():
    batches = [photos(0, 1), photos(2, 2, valid=[True, False])]
    batches[1].rows += 2
    results = run(evaluator(), ANSWERS, batches)
    # recall: cos 30 (puppy, dog), 1 (sky), -cos 90... the empty reference against dog, car: 0.
    assert results["recall"] == pytest.approx((COS30 + 1 + 0) / 3)
    # precision: (car-puppy cos 60 + dog-puppy cos 30) / 2; (1 + cos 30) / 2; (-1 + 0) / 2
    wanted = ((0.5 + COS30) / 2 + (1 + COS30) / 2 - 0.5) / 3
    assert results["precision"] == pytest.approx(wanted)
    assert results["images"] == 3 and results["labels"] == 2 and results["without_reference"] == 1


def test_fewer_labels_are_the_first_ones(tmp_path):
    run(evaluator(), ANSWERS, [photos(0)], tmp_path)
    curves = json.loads((tmp_path / "curves.json").read_text())
    points = curves["k"][""]
    assert [point["k"] for point in points] == [1, 2]
    assert points[0]["recall"] == pytest.approx(0.5)  # "car", chosen first though ranked second
    assert points[1]["recall"] == pytest.approx(COS30)
    by_threshold = {p["threshold"]: p["recall"] for p in curves["threshold"][""]}
    assert by_threshold == {
        0.0: pytest.approx(COS30),
        0.3: pytest.approx(COS30),
        0.5: pytest.approx(COS30),
        1.0: 0,
    }


def test_files(tmp_path, capsys):
    run(evaluator(published="coco"), ANSWERS, [photos(0, 1)], tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["photo0", "photo1"]
    assert lines[0]["labels"] == [["dog", 0.5], ["car", 0.2]]
    assert lines[0]["references"] == ["puppy"]
    assert lines[0]["recall"] == pytest.approx(COS30, abs=1e-6)
    picture = images.decode((tmp_path / "labels.png").read_bytes())
    assert picture.shape[0] > 192 and picture.shape[1] > 2 * 192
    assert images.decode((tmp_path / "curves.png").read_bytes()).ndim == 3
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_labels_are_first_embedded_all_at_once(monkeypatch):
    calls = []
    embed = text_embedder.load("minilm")
    monkeypatch.setattr(text_embedder, "load", lambda name: lambda w: calls.append(w) or embed(w))
    run(evaluator(), ANSWERS, [photos(0), photos(1)])
    assert set(calls[0]) == {"", "puppy", "dog", "car", "sky", "cat"}
    assert all(set(call) <= set(calls[0]) for call in calls)


def test_table_beside_the_paper():
    found = label_match.Evaluator(published="coco").table(
        dict(
            recall=0.5,
            precision=0.25,
            f1=1 / 3,
            images=7,
            frequent_recall=0.1,
            frequent_precision=0.1,
            frequent_f1=0.1,
        )
    )
    lines = found.splitlines()
    assert lines[0] == "Top 10 on coco, 7 images, embedding minilm"
    assert lines[4] == "| **this run** | measured | | 0.500 | 0.250 | 0.333 |"
    assert lines[5] == "| most frequent labels | measured | | 0.100 | 0.100 | 0.100 |"
    assert "| NXTP, G70M | paper, table 1 | 1.78 | 0.765 | 0.757 | 0.758 |" in lines
    assert "| NXTP, G3M checkpoint | released | 1.78 | 0.703 | 0.719 | 0.709 |" in lines
    assert len(lines) == 4 + 2 + 14
    clip = label_match.Evaluator(published="openimages", embedder="clip:somewhere")
    rows = clip.table(dict(recall=0, precision=0, f1=0, images=1)).splitlines()
    assert rows[5:] == ["| NXTP, G70M | paper, table A.8 | 1.78 | 0.881 | 0.838 | 0.858 |"]


def test_baselines():
    # Training photos: 3 is grey 30 with "dog", 4 is grey 40 with "car" and "sky", 5 with "car".
    references = [["sky"], [], [], ["dog"], ["car", "sky"], ["car"]]
    answers = [[("dog", 0.5), ("car", 0.4)]] * 6
    train = [
        batch_of(3, 4, references=references),
        batch_of(5, 3, references=references, valid=[True, False]),
    ]
    results = run(
        evaluator(baseline={"mixture": {"m": {"type": "memory"}}}),
        answers,
        [batch_of(0, references=references)],
        train=train,
    )
    # frequent: car (2), then dog before sky as it came first; sky at 90 degrees is car's direction
    assert results["frequent_recall"] == pytest.approx(1)
    assert results["frequent_precision"] == pytest.approx((1 + 0) / 2)
    # nearest to grey 0 is 3 (dog), then 4 (car)
    assert results["nearest_precision"] == pytest.approx((0 + 1) / 2)


def test_nearest_takes_distinct_labels():
    photos = np.array([0, 20, 200], np.uint8)[:, None, None, None] * np.ones((16, 16, 3), np.uint8)
    small = np.stack([label_match._shrink(photo) for photo in photos])
    known = label_match._Known([["a"], ["a", "b"], ["c"]], small, collections.Counter("aab"))
    assert known.guess(photos[2:], 2)["nearest"] == [["c", "a"]]
    assert known.guess(photos[:1], 9)["nearest"] == [["a", "b", "c"]]
    assert known.guess(photos, 1)["frequent"] == [["a"]] * 3


def test_bad_fields():
    with pytest.raises(ValueError, match="at least 1"):
        label_match.Evaluator(ks=(0, 5))
    with pytest.raises(ValueError, match="no published scores of 'lvis'; known: cc3m"):
        label_match.Evaluator(published="lvis")
    with pytest.raises(ValueError, match="no readable record"):
        run(evaluator(), ANSWERS, [photos(0, valid=[False])])


class NoReader:
    """A formatter that reads nothing."""

    def __call__(self, record, rng):
        return {"x": np.float32(0)}


def test_a_formatter_that_reads_no_answers_is_refused_before_training():
    data = dict(mixture=dict(a=dict(type="memory", records=[{}])))
    (evaluation,) = evaluate.make({"x": dict(type="label_match", data=data)})
    with pytest.raises(config_lib.ConfigError, match="compares answers, and NoReader reads none"):
        evaluate.check(evaluation, object(), NoReader(), {})


def test_the_predictor_is_asked_for_as_many_labels_as_are_scored():
    assert label_match.Evaluator(k=5, ks=(1, 3)).options == {"k": 5}
    assert label_match.Evaluator(k=5).options == {"k": 10}


def test_baseline_fields_are_checked_early():
    with pytest.raises(config_lib.ConfigError, match="mixtures"):
        label_match.Evaluator(baseline=dict(mixtures={}))


class Formatter:
    words = ("dog", "cat", "car")

    def __call__(self, record, rng):
        photo_u8 = np.full((20, 20, 3), record["grey"], np.uint8)
        truth = answer.Answer(labels=tuple((label, 1.0) for label in record["labels"]))
        return {"photos_u8": photo_u8, "host": answer.Host(truth=truth, images=(photo_u8,))}

    def read(self, outputs, hosts):
        return [
            answer.Answer(labels=[(self.words[i], 0.5) for i in row]) for row in outputs["word"]
        ]


class JaxTask:
    """Branch j of an image says the j-th word, by its brightness."""

    @staticmethod
    def one_shot(params, batch, rng, *, k):
        return {"word": (batch["photos_u8"][:, 0, 0, :1] // 100 + jnp.arange(k)) % 3}

    predict = {"one_shot": one_shot}


def test_through_the_runner(tmp_path):
    rows = [
        {"id": "a", "grey": 0, "labels": ["dog"]},
        {"id": "b", "grey": 100, "labels": ["car"]},
        {"id": "c", "grey": 200, "labels": ["dog", "cat"]},
    ]
    data = dict(mixture=dict(m=dict(type="memory", records=rows)))
    entry = dict(type="label_match", data=data, baseline=data, batch_size=2, k=2, ks=(1, 2))
    (evaluation,) = evaluate.make({"labels": entry})
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=1, tensor=4))
    task, params = JaxTask(), {}
    evaluate.check(evaluation, task, Formatter(), params)
    runner = evaluate.Runner(task, Formatter(), mesh, {}, 0)
    results = runner(evaluation, params, tmp_path)
    # dog cat | cat car | car dog, against dog | car | dog cat (cat at 60 degrees)
    assert results["eval/labels/recall"] == pytest.approx((1 + 1 + (1 + COS30) / 2) / 3)
    assert results["eval/labels/images"] == 3
    assert results["eval/labels/nearest_recall"] > 0.9  # the photo itself is in the baseline's data
    lines = (tmp_path / "labels" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", "b", "c"]
