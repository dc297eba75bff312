"""The BERT encoder against transformers on random weights, and its mean over tokens."""

import jax
import numpy as np
import pytest

from vlm_jax.models import bert
from vlm_jax.nn import functional
from vlm_jax.weights import bert as bert_weights
from vlm_jax.weights import convert

CFG = bert.PRESETS["tiny"]


@pytest.fixture(scope="module")
def reference():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=CFG.vocab_size,
        hidden_size=CFG.width,
        num_hidden_layers=CFG.depth,
        num_attention_heads=CFG.num_heads,
        intermediate_size=CFG.mlp_width,
        max_position_embeddings=CFG.max_tokens,
        layer_norm_eps=CFG.norm_eps,
        initializer_range=0.5,
    )
    return transformers.BertModel(config).eval()


@pytest.fixture(scope="module")
def tensors(reference):
    return {name: x.numpy() for name, x in reference.state_dict().items()}


def network():
    return functional.Functional(lambda rngs: bert.Bert(CFG, rngs))


@jax.jit
def apply(params, tokens, valid):
    module = network().bind(params)
    return module(tokens, valid), module.embed(tokens, valid)


def test_agrees_with_transformers(reference, tensors):
    import torch

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CFG.vocab_size, (3, 7))
    valid = np.arange(7) < np.array([[7], [4], [1]])
    with torch.no_grad():
        wanted = reference(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(valid)
        ).last_hidden_state.numpy()
    hidden, embedded = apply(bert_weights.from_hf(tensors, CFG), tokens, valid)
    found = np.asarray(hidden)
    np.testing.assert_allclose(found[valid], wanted[valid], atol=2e-5)
    means = [x[v].mean(axis=0) for x, v in zip(wanted, valid, strict=True)]
    np.testing.assert_allclose(embedded, means, atol=2e-5)


def test_padding_changes_nothing():
    params = jax.jit(network().init)(jax.random.key(0))
    tokens = np.array([[5, 6, 7]])
    _, short = apply(params, tokens, np.ones((1, 3), bool))
    longer = np.pad(tokens, ((0, 0), (0, 4)), constant_values=9)
    _, long = apply(params, longer, np.arange(7)[None] < 3)
    np.testing.assert_allclose(long, short, atol=1e-6)


def test_too_many_tokens():
    with pytest.raises(ValueError, match="13 tokens for 12 positions"):
        jax.eval_shape(apply, network().abstract(), np.zeros((1, 13), int), np.ones((1, 13), bool))


def test_size_of_minilm():
    shapes = functional.flatten(
        functional.Functional(lambda rngs: bert.Bert(bert.PRESETS["minilm_l6"], rngs)).abstract()
    )
    assert sum(int(np.prod(x.shape)) for x in shapes.values()) == 22_565_376


def test_weights_go_back_and_forth(tensors):
    params = bert_weights.from_hf(tensors, CFG)
    back = bert_weights.to_hf(params, CFG)
    unused = {name for name in tensors if name.startswith("pooler")}
    assert set(back) == {name for name in tensors if "position_ids" not in name} - unused
    for name, load in back.items():
        np.testing.assert_array_equal(load(), tensors[name])


def test_one_missing_and_one_extra_tensor_are_named(tensors):
    changed = {**tensors, "encoder.layer.9.extra": np.zeros(1)}
    del changed["encoder.layer.1.output.dense.bias"]
    with pytest.raises(convert.ConversionError) as caught:
        bert_weights.from_hf(changed, CFG)
    assert "encoder.layer.9.extra" in str(caught.value)
    assert "encoder.layer.1.output.dense.bias: missing" in str(caught.value)


def test_other_kinds_of_bert_are_refused():
    with pytest.raises(ValueError, match="hidden_act='relu' is not supported"):
        bert_weights.config_from_hf(dict(model_type="bert", hidden_act="relu"))
