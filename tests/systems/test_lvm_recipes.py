"""The evaluations and the packing of the full LVM recipes."""

import pathlib

import numpy as np
import pytest

from vlm_jax import main as main_lib
from vlm_jax.data import pipeline
from vlm_jax.program import evaluate, run
from vlm_jax.systems import lvm

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def read(name, tmp_path, *overrides):
    argv = ["main", f"--config={CONFIGS / name}", "--workdir=w", *overrides]
    values = main_lib._define_flags(main_lib._locate_recipe(argv))
    values(argv)
    return run.read_recipe(values["config"].value, tmp_path)


PATHS = {
    "perplexity": "list.path",
    "context": "videos.path",
    "segmentation": "pairs.queries.path",
    "detection": "pairs.queries.path",
    "colorization": "pairs.queries.path",
    "generation": "list.path",
}


def test_the_papers_evaluations_wait_for_a_path(tmp_path):
    recipe = read("lvm_3b.py", tmp_path)
    assert set(recipe.evals) == set(PATHS) and evaluate.make(recipe.evals) == []
    for name, path in PATHS.items():
        flag = f"--config.evals.{name}.data.mixture.{path}=/data"
        (found,) = evaluate.make(read("lvm_300m.py", tmp_path, flag).evals)
        assert found.name == name


@pytest.mark.parametrize("name", ["lvm_3b.py", "lvm_7b.py"])
def test_sentences_are_kept_apart_unless_asked_otherwise(name, tmp_path):
    """Two sentences of 8 images: apart in one row, or one stream as the reference's."""
    images = np.arange(8 * 256, dtype="<i4").tobytes()
    rows = [{"tokens": images, "id": str(i)} for i in range(4)]

    def first(arg):
        recipe = read(name + arg, tmp_path)
        system_task = lvm.make_task(dict(preset="lvm_debug", max_tokens=4096), **recipe.task)
        formatter = lvm.make_formatter(**recipe.formatter)
        config = pipeline.DataConfig(
            mixture=dict(m=dict(type="memory", records=rows)), packing=recipe.data.packing
        )
        with pipeline.make_batches(config, formatter, batch_size=1, seed=0) as batches:
            batch = next(batches).arrays
        system_task.check_batch(batch)
        return recipe, {key: x[0] for key, x in batch.items()}

    recipe, row = first("")
    assert (recipe.task["attention"], recipe.task["loss_mean"]) == ("documents", "token")
    # BOS and 2,048 ids: 2,048 inputs each, without EOS, positions from 0 in both.
    np.testing.assert_array_equal(np.bincount(row["segments"]), [0, 2048, 2048])
    np.testing.assert_array_equal(row["tokens"][[0, 1, 2048, 2049]], [8192, 0, 8192, 0])
    np.testing.assert_array_equal(row["positions"][[0, 2047, 2048]], [0, 2047, 0])
    assert (row["weights"] == 1).all() and row["targets"][2047] == 2047

    recipe, row = first(":reference")
    assert (recipe.task["attention"], recipe.task["loss_mean"]) == ("causal", "row")
    np.testing.assert_array_equal(row["tokens"][[0, 1, 2049, 2050]], [8192, 0, 8193, 8192])
    np.testing.assert_array_equal(row["positions"], np.arange(4096))
    assert (row["segments"] == 1).all()


def test_the_7b_numbers_hold_in_both_forms(tmp_path):
    for arg in ("", ":reference"):
        recipe = read(f"lvm_7b.py{arg}", tmp_path)
        assert recipe.optim.decay_steps == 288_000 and recipe.train.accumulate == 4
