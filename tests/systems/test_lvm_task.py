"""LVM's task: batches that do not fit its model, and what is said first of checkpoints."""

import json

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax.program import config as config_lib
from vlm_jax.systems import lvm
from vlm_jax.weights import errors, export
from vlm_jax.weights import llama as llama_weights

MODEL = dict(preset="lvm_debug", vocab_size=40, width=32, depth=1, mlp_width=48, num_heads=2)


def batch_of(ids):
    tokens = np.array([ids], np.int32)
    ones = np.ones_like(tokens)
    return {"tokens": tokens, "weights": ones.astype(np.float32), "segments": ones}


def test_ids_that_the_model_has_not_are_refused_before_training():
    task = lvm.make_task(MODEL, codebook_size=32)
    task.check_batch(batch_of([0, 39]))
    with pytest.raises(config_lib.ConfigError, match="token id 40 for a model .*vocab_size=40"):
        task.check_batch(batch_of([0, 40]))


def test_what_is_said_first(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*nowhere"):
        vlm_jax.load("lvm", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*nowhere"):
        vlm_jax.load("nxtp", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="holds no weights; looked for"):
        vlm_jax.load("lvm", str(tmp_path))


@pytest.mark.parametrize("field, value", [
    ("rope_theta", 5e5), ("num_attention_heads", 4), ("rms_norm_eps", 1e-3),
    ("rope_scaling", dict(rope_type="llama3", factor=8.0)),
])  # fmt: skip
def test_weights_that_were_trained_as_another_function_are_refused(tmp_path, field, value):
    """Equal shapes say nothing of rotary base, heads and epsilon; a config.json does."""
    task = lvm.make_task(MODEL, codebook_size=32)
    shapes = llama_weights.abstract_params(task.cfg)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    export.write(tmp_path, export.hf(llama_weights, zeros, task.cfg))
    assert lvm.load_upstream(str(tmp_path), task)["embed"]["table"].shape == (40, 32)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {field: value}
    if field == "num_attention_heads":
        config |= dict(num_key_value_heads=value, head_dim=8)
    file.write_text(json.dumps(config))
    with pytest.raises(errors.WeightsError, match="another function. Set model.|is not supported"):
        lvm.load_upstream(str(tmp_path), task)
    file.write_text("{}")  # of nothing
    lvm.load_upstream(str(tmp_path), task)


def test_a_codebook_that_does_not_fit_is_named_before_the_weights_are_read(tmp_path, monkeypatch):
    task = lvm.make_task(MODEL, codebook_size=32)
    shapes = llama_weights.abstract_params(task.cfg)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    export.write(tmp_path, export.hf(llama_weights, zeros, task.cfg))
    monkeypatch.setattr(llama_weights, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match="tokenizer 'tiny' has 1024 codes.*only 40 ids"):
        vlm_jax.load("lvm", str(tmp_path), tokenizer="tiny")
