"""Weights that are laid out as few writers do, or that say what cannot be: read right or named."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest
import torch

from vlm_jax.weights import bounds, errors, llama_configs, readers, vqgan

CONFIG = dict(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=2
)


def save(path, state):
    torch.save(state, path)
    return path


def values(path):
    return {name: np.asarray(x, np.float32) for name, x in readers.read(path).items()}


def test_compressed_archives_give_their_values(tmp_path):
    weights = torch.arange(1000.0)
    stored = save(tmp_path / "stored.pt", {"x": weights, "noise": torch.rand(4000)})
    with (
        zipfile.ZipFile(stored) as old,
        zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    found = values(tmp_path / "deflated.pt")
    assert found.keys() == {"x", "noise"}
    for name, x in values(stored).items():
        np.testing.assert_array_equal(found[name], x)


def test_names_that_are_numbers_and_texts(tmp_path):
    assert set(values(save(tmp_path / "a.pt", {1: torch.ones(2)}))) == {"1"}
    with pytest.raises(errors.WeightsError, match="mean the same"):
        readers.read(save(tmp_path / "b.pt", {1: torch.ones(2), "1": torch.zeros(2)}))


def test_conjugate_and_negative_views(tmp_path):
    x, y = torch.tensor([1 + 2j, 3 - 4j]), torch.tensor([1 + 2j, 3 - 4j])
    file = save(tmp_path / "a.pt", {"imag": x.conj().imag, "whole": y.conj()})
    found = readers.read(file)
    np.testing.assert_array_equal(found["imag"], [-2, 4])
    np.testing.assert_array_equal(found["whole"], [1 - 2j, 3 + 4j])


@pytest.mark.parametrize("key", ["model_state_dict", "module", "state_dict"])
def test_where_training_scripts_keep_the_state(tmp_path, key):
    file = save(tmp_path / "a.pt", {key: {"x": torch.ones(2)}, "epoch": 3})
    assert set(readers.read(file)) == {"x"} and key in readers.read(file).source


def test_views_that_repeat_a_storage_say_what_to_save(tmp_path):
    with pytest.raises(errors.WeightsError, match="tensor.clone"):
        readers.read(save(tmp_path / "a.pt", {"x": torch.ones(1, 4).expand(1000, 4)}))


@pytest.mark.parametrize("front", ["model.module.", "_orig_mod.module.", "module._orig_mod.model."])
def test_wrappers_in_any_order(tmp_path, front):
    names = ("model.embed", "lm_head")
    file = save(tmp_path / "a.pt", {front + name: torch.ones(2) for name in names})
    assert set(readers.read(file)) == set(names)


def test_a_module_in_a_module_in_a_module(tmp_path):
    file = save(
        tmp_path / "a.pt",
        {"model.model.model.embed": torch.ones(2), "model.model.lm_head": torch.ones(2)},
    )
    assert set(readers.read(file)) == {"model.embed", "lm_head"}


def safetensors(path, spans):
    entries = {
        name: {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in spans.items()
    }
    header = json.dumps(entries).encode()
    most = max(end for _, end in spans.values())
    content = np.arange(most // 4, dtype=np.float32).tobytes()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    return path


def test_tensors_that_share_bytes(tmp_path):
    good = safetensors(tmp_path / "a.safetensors", {"b": (4, 12), "none": (8, 8), "a": (0, 4)})
    np.testing.assert_array_equal(readers.read(good)["b"], [1, 2])
    with pytest.raises(errors.WeightsError, match="b begins at byte 4, a ends at 8"):
        readers.read(safetensors(tmp_path / "b.safetensors", {"a": (0, 8), "b": (4, 12)}))
    with pytest.raises(errors.WeightsError, match="b begins at byte 8, a ends at 16"):
        bounds.check_apart({"a": (0, 16), "b": (8, 12)}, "a.gguf")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_pipes_and_devices_do_not_hang(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(errors.WeightsError, match=f"{name} is a pipe, socket or device"):
            readers.read(path)
    with pytest.raises(errors.WeightsError, match="is a pipe"):
        bounds.read_json(tmp_path / name)


def test_what_accelerate_keeps_beside_the_weights(tmp_path):
    save(tmp_path / "pytorch_model.bin", {"x": torch.ones(2)})
    for name in ("sampler.bin", "sampler_1.bin", "optimizer_1.bin", "scaler.pt"):
        (tmp_path / name).write_bytes(b"no weights")
    assert set(readers.read(tmp_path)) == {"x"}


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no weights; .* found snapshots"):
        readers.read(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 0},
        {"rope_theta": -1e4},
        {"rope_theta": "10000"},
        {"rope_theta": True},
        {"rope_theta": 10**400},
        {"rms_norm_eps": -1e-6},
        {"rms_norm_eps": 1e30},
        {"tie_word_embeddings": "false"},
        {"tie_word_embeddings": 1},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": "linear"},
        {"rope_parameters": [1]},
    ],
)
def test_configs_of_another_function(fields):
    with pytest.raises((errors.WeightsError, OverflowError), match=next(iter(fields))[:3]):
        llama_configs.config_from_hf({**CONFIG, **fields})


@pytest.mark.parametrize("multiples", [[], [0], [1, 0, 2]])
def test_a_vqgan_without_levels(multiples):
    fields = vqgan.config_to_hf(vqgan.PRESETS["tiny"]) | {"channel_mult": multiples}
    with pytest.raises(ValueError, match="channel_mult=.* must name a level, each from 1"):
        vqgan.config_from_hf(fields)


def test_configs_with_whole_numbers_for_floats():
    cfg = llama_configs.config_from_hf({**CONFIG, "rope_theta": 500000, "rms_norm_eps": 0})
    assert isinstance(cfg.rope_theta, float) and (cfg.rope_theta, cfg.rms_eps) == (5e5, 0)
    defaults = dict.fromkeys(("rope_theta", "rope_scaling", "tie_word_embeddings"))
    assert llama_configs.config_from_hf(CONFIG | defaults) == llama_configs.config_from_hf(CONFIG)
