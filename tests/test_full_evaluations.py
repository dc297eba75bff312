"""The evaluations of every full recipe, on its real formatter and the shapes of its network."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from tests.test_recipes import RECIPES, read
from vlm_jax import task as task_lib
from vlm_jax.data import pipeline
from vlm_jax.encoders import image_tokenizer
from vlm_jax.program import evaluate

GOLDEN = pathlib.Path(__file__).parent / "golden" / "nxtp"
RNG = np.random.default_rng(0)


def photo():
    return RNG.integers(0, 256, (40, 50, 3), np.uint8)


class Ids:
    """Stands for the released tokenizer, which is 585 MB: as many ids an image, of 8,192."""

    side = 256

    def encode_u8(self, images_u8):
        return RNG.integers(0, 8192, (len(images_u8), 256)).astype(np.int32)

    def decode(self, ids):
        return np.zeros((len(ids), 256, 256, 3), np.float32)


@pytest.fixture
def tokenizer(monkeypatch):
    from vlm_jax.systems.lvm import task

    monkeypatch.setattr(image_tokenizer.ImageTokenizer, "load", lambda *args, **fields: Ids())
    task._tokenizer.cache_clear()
    yield
    task._tokenizer.cache_clear()


def prompts(images, targets):
    return [{"prompt": [photo() for _ in range(images)], "target": [photo()] * targets}]


def records_of(evaluation, system):
    """What the corpora of the paper would give."""
    kind, fields = evaluation.config.type, evaluation.config.formatter
    if system == "nxtp":
        return [{"image_u8": photo(), "labels": ["dog", "sofa"]}]
    if system == "nextchat":
        turns = ["Where is the dog?", "Answer: <at> <boxes> ."]
        return [{"image_u8": photo(), "turns": turns, "boxes_px": [[1, 2, 30, 35]]}]
    if system == "vqgan":
        return [{"image_u8": photo()}]
    if kind == "context_perplexity":
        return [{"tokens": RNG.integers(0, 8192, 4096).astype("<i4").tobytes()}]
    if kind == "generation":
        return [{**prompts(3, 0)[0], "output": "a.png"}]
    return prompts(fields["images"], fields["targets"])


OVERRIDES = {
    "lvm": ["--config.task.tokenizer=released"],
    "nxtp": [
        f"--config.formatter.tokenizer={GOLDEN / 'tokenizer.model'}",
        "--config.task.delimiter_id=335",
        "--config.model.decoder.vocab_size=354",
    ],
    "nextchat": [
        f"--config.formatter.tokenizer={GOLDEN.parent / 'nextchat' / 'tokenizer.model'}",
        "--config.model.decoder.vocab_size=405",
    ],
    "vqgan": [],
}
FORMS = {"lvm_3b": ("", ":reference")}


@pytest.mark.parametrize(
    "name, form",
    [
        (name, form)
        for name in RECIPES
        if name not in ("lvm_incontext",)  # no full form of a paper; its evaluations run in tests
        for form in FORMS.get(name, ("",))
    ],
)
def test_evaluations_fit_formatter_and_network(name, form, tmp_path, tokenizer):
    recipe = read(f"{name}.py{form}", tmp_path, *OVERRIDES[name.partition("_")[0]])
    module = task_lib.resolve(recipe.system, "systems")
    task = module.make_task(dict(recipe.model), **recipe.task)
    formatter = module.make_formatter(**recipe.formatter)
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    filled = {
        key: {**entry, "data": _with_paths(entry["data"])} for key, entry in recipe.evals.items()
    }
    evaluations = evaluate.make(filled)
    assert {x.name for x in evaluations} == set(recipe.evals) and evaluations
    for evaluation in evaluations:
        rows = records_of(evaluation, recipe.system)
        source = dict(type="memory", records=rows)
        data = pipeline.DataConfig(
            mixture={"m": source}, packing=evaluation.data.packing, shuffle=False, num_threads=0
        )
        evaluation = dataclasses.replace(evaluation, data=data)
        if hasattr(evaluation.evaluator, "prepare"):  # fetches published weights; not today
            evaluation.evaluator.prepare = lambda: None
        evaluate.check(evaluation, task, formatter, abstract)


def _with_paths(values):
    """Every empty path filled, so that the evaluation is active."""
    if not hasattr(values, "items"):
        return values
    return {
        key: "/somewhere" if key == "path" and not value else _with_paths(value)
        for key, value in values.items()
    }
