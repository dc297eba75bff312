"""docs/metrics.md names every number that training and evaluations give."""

import pathlib
import re

import jax
import numpy as np
import pytest

from tests import test_describe
from tests.evaluators import (
    fakes,
    test_caption_evaluator,
    test_few_shot_scores,
    test_grounding,
    test_yes_no,
)
from tests.evaluators import test_context_perplexity as context_rows
from tests.systems import test_nxtp_label_evaluator
from vlm_jax import task as task_lib
from vlm_jax.data import images
from vlm_jax.evaluators import (
    context_perplexity,
    few_shot,
    generation,
    perplexity,
    reconstruction,
)
from vlm_jax.program import config as config_lib
from vlm_jax.program import optim, train
from vlm_jax.program import run as run_lib

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "metrics.md"
embedder = test_nxtp_label_evaluator.embedder  # a fixture


def explained(heading):
    """Patterns of the keys below a heading, the placeholders in capitals."""
    text = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    column = rows[0].index("key") if "key" in rows[0] else rows[0].index("| key")
    names = [name for row in rows[1:] for name in re.findall("`(.+?)`", row[column])]
    return [re.compile(re.sub("[A-Z]+", "[a-z0-9_]+", name) + "$") for name in names]


def check(heading, keys):
    patterns = explained(heading)
    assert patterns and keys
    missing = [key for key in keys if not any(pattern.match(key) for pattern in patterns)]
    assert not missing, f"not in docs/metrics.md under {heading}"


def of_perplexity():
    batch = context_rows.rows([1, 2, 3])
    batch.arrays["weights"] = np.ones((1, 8))
    evaluator = perplexity.Evaluator(num_ids=9, baseline={"mixture": {}})

    def predict(batch):
        return {"logp": np.zeros(batch.arrays["targets"].shape)}

    return fakes.run(evaluator, [batch], predict=predict, other=[batch])


def of_context_perplexity():
    evaluator = context_perplexity.Evaluator(tokens_per_image=2, max_context=2, lead_tokens=1)
    batch = context_rows.rows([9, 1, 2, 3, 4, 5, 6])
    return fakes.run(evaluator, [batch], predict=context_rows.Predict())


def of_few_shot(monkeypatch):
    monkeypatch.setattr(few_shot, "_lpips", lambda: lambda a, b: np.zeros(len(a)))
    of = test_few_shot_scores
    batch = fakes.prompt_batch([[of.PHOTO, of.MASK1, of.PHOTO]], [of.TRUE], labels=[1], folds=[0])
    return {
        key: 0
        for kind in few_shot.KINDS
        for key in fakes.run(
            few_shot.Evaluator(kind=kind, lpips=True),
            [batch],
            reader=of.reader(of.TRUE),
            predict=of.predict([0]),
        )
    }


def of_generation():
    picture_u8 = fakes.gray([1, 2])
    batch = fakes.prompt_batch([[picture_u8]], [picture_u8])
    reader = fakes.Reader([images.to01(picture_u8)])

    def predict(batch):
        return {"ids": np.zeros((1, 1), int)}

    return fakes.run(generation.Evaluator(candidates=1), [batch], reader=reader, predict=predict)


def of_grounding():
    of = test_grounding
    return of.run(of.TRUE, of.SAID)


def of_captions():
    return test_caption_evaluator.run(["a dog", "a cat"], ["a dog", "the cat"])


def of_yes_no():
    return test_yes_no.run(["yes", "no"], ["yes", "no"])


def of_label_match():
    of = test_nxtp_label_evaluator
    train_batch = of.photos(0, 1)
    evaluator = of.evaluator(baseline={"mixture": {"m": {"type": "memory"}}})
    return of.run(evaluator, of.ANSWERS, [of.photos(0)], train=[train_batch])


def of_reconstruction(monkeypatch):
    monkeypatch.setattr(reconstruction.Evaluator, "_weights", lambda self: None)

    def distance(weights):
        return lambda a, b: np.zeros(len(a))

    monkeypatch.setattr(reconstruction.perceptual, "Lpips", distance)

    def features(weights, layer):
        return lambda a: a.mean(axis=(1, 2))

    monkeypatch.setattr(reconstruction.perceptual, "Vgg16Features", features)
    image01 = np.random.default_rng(0).random((4, 16, 16, 3)).astype(np.float32)
    outputs = {"image01": image01, "recon01": image01, "ids": np.zeros((4, 16), int)}
    return fakes.run(
        reconstruction.Evaluator(codes=4, ssim=True, lpips=True, frechet=True),
        [fakes.batch_of({"image01": image01})],
        predict=lambda batch: outputs,
    )


def test_every_score_is_explained(monkeypatch):
    scores = {
        "perplexity": of_perplexity(),
        "context_perplexity": of_context_perplexity(),
        "few_shot": of_few_shot(monkeypatch),
        "generation": of_generation(),
        "grounding": of_grounding(),
        "label_match": of_label_match(),
        "reconstruction": of_reconstruction(monkeypatch),
        "captions": of_captions(),
        "yes_no": of_yes_no(),
        "image_grid": {"token_match": 0},  # of LvmTask
    }
    assert set(scores) == set(task_lib.known("evaluators"))
    for name, found in scores.items():
        check(f"`{name}`", found)


@pytest.mark.parametrize(
    "name", ["perplexity", "grounding", "label_match", "few_shot", "reconstruction"]
)
def test_baselines_are_scores(name, monkeypatch):
    """What an evaluator calls baselines are keys that it gives, of keys that it gives."""
    given = {
        "perplexity": of_perplexity,
        "grounding": of_grounding,
        "label_match": of_label_match,
        "few_shot": lambda: of_few_shot(monkeypatch),
        "reconstruction": lambda: of_reconstruction(monkeypatch),
    }[name]()
    baselines = task_lib.resolve(name, "evaluators").Evaluator.baselines
    assert set(baselines) & set(given)
    assert {score for key, score in baselines.items() if key in given} <= set(given)


@pytest.mark.parametrize(
    "name", ["lvm_3b.py:tiny", "nxtp_g3m.py:tiny", "vqgan_f16.py:tiny_decoder"]
)
def test_every_metric_of_training_is_explained(name, tmp_path):
    recipe = run_lib.read_recipe(
        test_describe.values_of(name, "--config.train.batch_size=2"), tmp_path
    )
    system = task_lib.resolve(recipe.system, "systems")
    task = system.make_task(dict(recipe.model), **recipe.task)
    optimizer = optim.make_optimizer(recipe.optim, recipe.train.steps)
    state = jax.eval_shape(lambda: train.init_state(task, optimizer, recipe, jax.random.key(0)))
    made = {
        "vqgan": lambda: {"image01": np.zeros((2, 64, 64, 3), np.float32)},
        "lvm": lambda: {key: np.zeros((2, 512), np.int32) for key in (*fakes.NAMES, "valid")},
        "nxtp": lambda: _example(system, recipe),
    }[recipe.system]()
    batch = {**made, "valid": np.ones(2, bool)}
    step = getattr(system, "make_train_step", train.make_train_step)(task, optimizer, recipe)
    _, metrics = jax.eval_shape(step, state, batch, jax.random.key(0))
    shared = {key for key in metrics if key == "loss" or key.startswith("optim/")}
    check("Training, every system", shared)
    check("Training, per system", set(metrics) - shared)


def _example(system, recipe):
    formatter = config_lib.call(system.make_formatter, recipe.formatter, "formatter")
    row = formatter({"image_u8": np.zeros((64, 64, 3), np.uint8), "labels": ["cat"]})
    return {key: np.stack([x, x]) for key, x in row.items() if key != "host"}
