"""LLaMA checkpoints in every layout against the reference logits."""

import dataclasses
import json
import pathlib

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization

from vlm_jax.models import llama as model
from vlm_jax.nn import functional
from vlm_jax.weights import convert, errors, export, lazy, llama, readers


@pytest.fixture(scope="module")
def cfg(golden_lvm):
    return llama.config_from_hf(json.loads((golden_lvm / "config.json").read_text())["llama"])


@pytest.fixture(scope="module")
def tensors(golden_lvm):
    return readers.read(golden_lvm / "llama.safetensors")


@pytest.fixture(scope="module")
def params(tensors, cfg):
    return llama.from_hf(tensors, cfg)


@pytest.fixture(scope="module")
def easylm(params):
    """EasyLM's names and layout, float32."""
    return {name: load() for name, load in convert.revert(params, llama.EASYLM_RULES).items()}


def assert_same(ours, expected):
    ours, expected = functional.flatten(ours), functional.flatten(expected)
    assert ours.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)


def test_config(cfg):
    assert cfg == model.LlamaConfig(100, 64, 2, 128, 4, max_tokens=512)


def test_reference_logits(golden_lvm, params, cfg):
    arrays = np.load(golden_lvm / "io.npz")
    network = functional.Functional(lambda rngs: model.Llama(cfg, rngs)).bind(params)
    logits = network(arrays["lm.input_ids"]).logits
    np.testing.assert_allclose(logits, arrays["lm.logits"], atol=2e-4)


def test_released_stream_is_the_same_model_to_bf16_rounding(golden_lvm, params, cfg):
    path = f"params::{golden_lvm / 'streaming_params_bf16.msgpack'}"
    _, ours = llama.load(path, cfg, param_dtype="bfloat16")
    flat = functional.flatten(params)
    assert_same(ours, {path: x.astype(ml_dtypes.bfloat16) for path, x in flat.items()})
    back = {name: load() for name, load in llama.to_hf(ours, cfg).items()}
    hf = readers.read(golden_lvm / "llama.safetensors")
    assert sorted(back) == sorted(hf)
    for name in hf:  # our table's reorder of q and k against the reference program's own
        np.testing.assert_array_equal(back[name], hf[name].astype(ml_dtypes.bfloat16))


def write_stream(file, leaves):
    packer = msgpack.Packer()
    with open(file, "wb") as stream:
        for path, value in leaves.items():
            stream.write(packer.pack((path.split("/"), serialization.to_bytes(value))))


@pytest.mark.parametrize("kind", ["trainstate", "trainstate_params", "params", "flax_params"])
def test_four_easylm_kinds(tmp_path, easylm, params, cfg, kind):
    file = tmp_path / "checkpoint"
    if kind == "flax_params":
        file.write_bytes(serialization.to_bytes(functional.unflatten(easylm)))
    elif kind == "params":
        write_stream(file, easylm)
    else:
        below = {f"params/params/{name}": x for name, x in easylm.items()}
        moments = {f"opt_state/1/0/mu/params/{name}": x for name, x in easylm.items()}
        write_stream(file, {"step": np.int32(7), **below, **moments})
    got, ours = llama.load(f"{kind}::{file}", cfg)
    assert got == cfg
    assert_same(ours, params)


def test_sharded_hf_folder_and_torch(tmp_path, golden_lvm, params, cfg):
    torch = pytest.importorskip("torch")
    written = export.hf(llama, params, cfg)
    digests = export.write(tmp_path / "hf", written, max_shard_bytes=100_000)
    assert len(digests) > 2
    got, ours = llama.load(tmp_path / "hf")
    assert got == cfg
    assert_same(ours, params)
    hf = readers.read(golden_lvm / "llama.safetensors")
    (tmp_path / "bin").mkdir()
    state = {name: torch.tensor(hf[name]) for name in hf}
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    got, ours = llama.load(tmp_path / "bin")
    assert got == cfg
    assert_same(ours, params)


def test_gguf_layout_undoes_the_same_reorder(params, easylm, cfg):
    written = {name: load() for name, load in convert.revert(params, llama.GGUF_RULES).items()}
    assert_same(llama.from_gguf(written, cfg), params)
    np.testing.assert_array_equal(
        written["blk.1.attn_k.weight"].T, easylm["transformer/h/1/attention/wk/kernel"]
    )


def test_pairs_to_halves_by_hand():
    # One head of width 6, one input: pairs (0 1) (2 3) (4 5) -> first halves, second halves.
    (rule,) = [rule for rule in llama.EASYLM_RULES if rule.ours == "layers/attn/q/kernel"]
    pairs = np.arange(6)[None]
    halves = rule.load(pairs, (1, 1, 6))
    np.testing.assert_array_equal(halves[0, 0], [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(rule.save(halves), pairs)


@pytest.fixture(scope="module")
def meta():
    """The decoder of the tiny NXTP model: 2 blocks of Meta's layout, 354 ids."""
    folder = pathlib.Path(__file__).parents[1] / "golden" / "nxtp"
    prefix = "language_decoder."
    tensors = readers.read(folder / "checkpoint.safetensors")
    names = [name for name in tensors if name.startswith(prefix)]
    arrays = {name.removeprefix(prefix): tensors[name] for name in names}
    return arrays | {"rope.freqs": np.zeros(8)}


META_PARAMS = {
    "dim": 64,
    "multiple_of": 16,
    "n_heads": 4,
    "n_layers": 2,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}


def test_meta_layout(meta):
    ours = llama.config_from_meta(META_PARAMS, 354)
    assert ours == model.LlamaConfig(354, 64, 2, 176, 4, rms_eps=1e-5)
    params = llama.from_meta(meta, ours)
    # Row 1 of the first head's wk is channel 1 of pair 0: the first of the second half for us.
    np.testing.assert_array_equal(
        params["layers"]["attn"]["k"]["kernel"][0, :, 0, 8],
        meta["layers.0.attention.wk.weight"][1],
    )
    back = {name: load() for name, load in llama.to_meta(params).items()}
    assert back.keys() | {"rope.freqs"} == meta.keys()
    for name, x in back.items():
        np.testing.assert_array_equal(x, meta[name], err_msg=name)
    hf = {name: load() for name, load in llama.to_hf(params, ours).items()}
    assert_same(llama.from_hf(hf, ours), params)
    # The heads are told by the stored angles.
    shapes = llama.config_from_shapes(meta)
    assert shapes == dataclasses.replace(ours, rms_eps=shapes.rms_eps)


def test_meta_folder_and_its_first_blocks(tmp_path, meta):
    torch = pytest.importorskip("torch")
    torch.save(
        {name: torch.tensor(x) for name, x in meta.items()}, tmp_path / "consolidated.00.pth"
    )
    (tmp_path / "params.json").write_text(json.dumps(META_PARAMS))
    cfg, both = llama.load(tmp_path)
    assert (cfg.depth, cfg.mlp_width, cfg.vocab_size, cfg.rms_eps) == (2, 176, 354, 1e-5)
    cfg, one = llama.load(tmp_path, blocks=1)
    assert cfg.depth == 1
    first = {**both, "layers": jax.tree.map(lambda x: x[:1], both["layers"])}
    assert_same(one, first)
    native = functional.flatten(both)
    assert_same(llama.from_native(llama.first_blocks(native, 1), cfg), first)
    with pytest.raises(ValueError, match="3 blocks asked for, 2 are there"):
        llama.load(tmp_path, blocks=3)
    (tmp_path / "consolidated.01.pth").touch()
    with pytest.raises(ValueError, match="split over several files"):
        llama.load(tmp_path)


def test_meta_widths():
    # LLaMA-2 7B and 70B, LLaMA-3 8B as published: the MLP width is derived.
    base = {"norm_eps": 1e-5, "vocab_size": -1}
    seven = base | {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32}
    assert llama.config_from_meta(seven, 32000).mlp_width == 11008
    seventy = base | {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
    }
    assert llama.config_from_meta(seventy, 32000).mlp_width == 28672
    eight = base | {
        "dim": 4096,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 32,
        "n_kv_heads": 8,
        "n_layers": 32,
        "rope_theta": 500000.0,
    }
    cfg = llama.config_from_meta(eight, 128256)
    assert (cfg.mlp_width, cfg.kv_heads, cfg.rope_theta) == (14336, 8, 5e5)
    with pytest.raises(ValueError, match="use_scaled_rope"):
        llama.config_from_meta(eight | {"use_scaled_rope": True}, 128256)
    with pytest.raises(ValueError, match="n_layers.*not a params.json"):
        llama.config_from_meta({"dim": 4096, "n_heads": 32}, 32000)


def test_stored_rotary_tables_are_ignored_and_a_tied_copy_of_the_head(tensors, params, cfg):
    more = dict(tensors) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8)}
    assert_same(llama.from_hf(more, cfg), params)
    more["lm_head.weight"] = more["model.embed_tokens.weight"].copy()
    tied = dataclasses.replace(cfg, tie_embeddings=True)
    assert "lm_head" not in llama.from_hf(more, tied)


@pytest.mark.parametrize("layout", ["hf", "meta", "easylm", "gguf"])
def test_a_head_of_its_own_is_kept_whatever_the_config_says(layout, params, cfg, monkeypatch):
    """As transformers from version 5 on; a model that ties is told, not given another head."""
    rules = dict(
        hf=llama.HF_RULES, meta=llama.META_RULES, easylm=llama.EASYLM_RULES, gguf=llama.GGUF_RULES
    )[layout]
    stored = lazy.Tensors(convert.revert(params, rules), "file")
    tied = dataclasses.replace(cfg, tie_embeddings=True)
    monkeypatch.setattr(llama, "_config_of", lambda *_: tied)
    assert llama.config_of(stored, "file") == cfg
    with pytest.raises(errors.WeightsError, match="its head is not its embedding.*tie_embeddings"):
        llama.from_tensors(stored, tied)
    copy = {"embed": params["embed"], "lm_head": {"kernel": params["embed"]["table"].T}}
    stored = lazy.Tensors(convert.revert(params | copy, rules), "file")
    assert llama.config_of(stored, "file") == tied
    assert "lm_head" not in llama.from_tensors(stored, tied)


def test_without_a_head_the_config_must_say_that_it_is_tied(tensors, params, cfg):
    bare = {name: x for name, x in tensors.items() if name != "lm_head.weight"}
    with pytest.raises(errors.WeightsError, match="there is no head.*tie_word_embeddings"):
        llama.from_hf(bare, cfg)
    assert "lm_head" not in llama.from_hf(bare, dataclasses.replace(cfg, tie_embeddings=True))


def test_missing_and_extra_tensor_in_one_error(tensors, cfg):
    wrong = dict(tensors)
    wrong["model.layers.1.self_attn.q_porj.weight"] = wrong.pop(
        "model.layers.1.self_attn.q_proj.weight"
    )
    with pytest.raises(convert.ConversionError) as caught:
        llama.from_hf(wrong, cfg)
    first, second = caught.value.errors
    assert first.startswith("model.layers.1.self_attn.q_porj.weight: in the checkpoint")
    assert second.startswith("model.layers.1.self_attn.q_proj.weight: missing")
    assert "layers/attn/q/kernel" in second


def test_checkpoint_of_another_size(tensors, cfg):
    with pytest.raises(convert.ConversionError, match=r"has shape \(100, 64\).*needs \(101, 64\)"):
        llama.from_hf(tensors, dataclasses.replace(cfg, vocab_size=101))


def test_not_a_llama(golden_lvm, cfg):
    with pytest.raises(ValueError, match="not a LLaMA checkpoint"):
        llama.load(golden_lvm / "vqgan.safetensors", cfg)


# ---- configs ----


def test_config_round_trip():
    for preset in model.PRESETS.values():
        assert llama.config_from_hf(llama.config_to_hf(preset)) == preset


def test_released_config_defaults():
    # LVM's config.json and transformers 4's defaults, transformers 5's nesting
    fields = dict(
        vocab_size=8292,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        torch_dtype="float16",
        bos_token_id=1,
        eos_token_id=2,
    )
    assert llama.config_from_hf(fields) == model.PRESETS["lvm_7b"]
    nested = fields | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert llama.config_from_hf(nested).rope_theta == 5e5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_variants_are_refused(change, message):
    fields = llama.config_to_hf(model.PRESETS["lvm_debug"]) | change
    with pytest.raises(ValueError, match=message):
        llama.config_from_hf(fields)


def test_config_without_sizes():
    with pytest.raises(ValueError, match=r"\['vocab_size', .*not a LLaMA config"):
        llama.config_from_hf({})


@pytest.mark.parametrize("rules", [llama.HF_RULES, llama.EASYLM_RULES])
@pytest.mark.parametrize("preset", ["lvm_debug", "smollm2_135m"])
def test_config_from_shapes_of_a_preset(rules, preset):
    cfg = model.PRESETS[preset]
    shapes = convert.reverted_shapes(llama.abstract_params(cfg), rules)
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert llama.config_from_shapes(tensors) == cfg


def test_config_from_shapes_needs_the_heads(golden_lvm, tensors, cfg):
    with pytest.raises(ValueError, match="do not tell the number of heads; put a config.json"):
        llama.config_from_shapes(tensors)
    ours = dataclasses.replace(cfg, max_tokens=4096)
    assert llama.config_from_shapes(tensors, num_heads=4) == ours
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8)}
    assert llama.config_from_shapes(dict(tensors) | table) == ours


def test_gguf_config():
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "llama.context_length": 8192,
        "llama.embedding_length": 576,
        "llama.feed_forward_length": 1536,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.rope.freq_base": 100000.0,
        "llama.vocab_size": 49152,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.rope.dimension_count": 64,
    }
    assert llama.config_from_gguf(metadata, tied=True) == model.PRESETS["smollm2_135m"]
    for change in ({"general.architecture": "qwen2"}, {"llama.rope.dimension_count": 32}):
        with pytest.raises(ValueError, match="qwen2|32 of 64"):
            llama.config_from_gguf(metadata | change, tied=True)
