"""Checkpoints as people have them: wrappers, dtypes, folders, and files that are something else."""

import argparse
import json
import pathlib

import numpy as np
import pytest

from vlm_jax.weights import errors, readers

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

STATE = {
    "model.embed.weight": torch.linspace(-2, 2, 12).reshape(4, 3),
    "model.layers.0.up.weight": torch.linspace(0.1, 1, 6).reshape(3, 2),
}
LORA = {"base_model.model.q.lora_A.default.weight": torch.ones(2, 2)}


def check(tensors, state=STATE, rtol=0.0):
    assert sorted(tensors) == sorted(state)
    for name, x in state.items():
        made = np.asarray(tensors[name], np.float32)
        np.testing.assert_allclose(made, x.detach().float().numpy(), rtol=rtol)


@pytest.fixture(params=["safetensors", "bin"])
def save(request, tmp_path):
    """Writes a state dict in either format and reads it."""

    def write(state, name="model"):
        if request.param == "safetensors":
            file = tmp_path / f"{name}.safetensors"
            safetensors_torch.save_file({k: x.contiguous() for k, x in state.items()}, file)
        else:
            file = tmp_path / f"{name}.bin"
            torch.save(state, file)
        return file

    return write


@pytest.mark.parametrize(
    "dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_dtypes(save, dtype):
    state = {name: x.to(getattr(torch, dtype)) for name, x in STATE.items()}
    tensors = readers.read(save(state))
    check(tensors, state)
    assert {tensors[name].dtype.name for name in tensors} == {dtype}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_that_require_a_gradient(tmp_path, dtype):
    state = {name: torch.nn.Parameter(x.to(getattr(torch, dtype))) for name, x in STATE.items()}
    torch.save(state, tmp_path / "x.bin")
    check(readers.read(tmp_path / "x.bin"), state)


@pytest.mark.parametrize("rename", [
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module._orig_mod.{name}",
    lambda name: f"_forward_module.{name}",
    lambda name: f"base_model.model.{name}",
    lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    lambda name: name.replace("layers.0.", "_fsdp_wrapped_module.layers.0."),
    lambda name: f"model.{name}",
])  # fmt: skip
def test_prefixes_of_wrappers_are_dropped(save, rename):
    check(readers.read(save({rename(name): x for name, x in STATE.items()})))


def test_other_prefixes_stay(save):
    state = {"module.a": torch.ones(2), "b": torch.ones(2), "x_orig_mod.c": torch.ones(1)}
    check(readers.read(save(state)), state)
    with pytest.raises(errors.WeightsError, match="model.a comes twice"):
        readers.read(save({"model.a": torch.ones(1), "model._orig_mod.a": torch.ones(1)}, "two"))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
def test_fp8_is_multiplied_with_its_scales(save, shape):
    x = STATE["model.embed.weight"]
    scale = (x.abs().amax(1) if 4 in shape else x.abs().max()).reshape(shape) / 448
    stored = {
        "a.weight": (x / (scale.reshape(-1, 1) if shape else scale)).to(torch.float8_e4m3fn),
        "a.weight_scale": scale,
        "a.input_scale": torch.ones(1),
        "logit_scale": torch.ones(()),
    }
    check(readers.read(save(stored)), {"a.weight": x, "logit_scale": torch.ones(())}, rtol=2**-4)


def test_other_quantisations_are_refused_with_the_reason(save):
    fp8 = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    blocks = readers.read(save({"w": fp8, "w_scale_inv": torch.ones(2, 2)}, "blocks"))
    with pytest.raises(errors.WeightsError, match="w_scale_inv of .2, 2.; only fp8 with one scale"):
        blocks["w"]
    packed = {"a.qweight": torch.zeros(2, 2, dtype=torch.int32), "a.scales": torch.ones(2)}
    with pytest.raises(errors.WeightsError, match="quantised to integers .a.qweight"):
        readers.read(save(packed, "packed"))


def test_adapters_are_explained(save):
    with pytest.raises(errors.WeightsError, match="LoRA adapter that is not merged.*merge_and_unl"):
        readers.read(save(STATE | LORA, "merged_not"))


def test_an_adapter_beside_its_base_or_alone(tmp_path):
    safetensors_torch.save_file(LORA, tmp_path / "adapter_model.safetensors")
    with pytest.raises(errors.WeightsError, match="LoRA adapter .*its base is not there"):
        readers.read(tmp_path)
    safetensors_torch.save_file(STATE, tmp_path / "model.safetensors")
    with pytest.raises(errors.WeightsError, match="it would be left out of model.safetensors"):
        readers.read(tmp_path)
    check(readers.read(tmp_path / "model.safetensors"))


def test_what_a_trainer_leaves_beside_the_weights(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    names = (
        "training_args.bin",
        "optimizer.bin",
        "scheduler.bin",
        "optimizer.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "scaler.pt",
    )
    for name in names:
        torch.save({"lr": 1}, tmp_path / name)
    check(readers.read(tmp_path))
    torch.save(STATE, tmp_path / "other.bin")
    with pytest.raises(errors.WeightsError, match="several weights: other.bin, pytorch_model.bin"):
        readers.read(tmp_path)


def test_the_copy_in_the_names_of_meta_is_not_taken(tmp_path):
    safetensors_torch.save_file(STATE, tmp_path / "model.safetensors")
    safetensors_torch.save_file({"a": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    check(readers.read(tmp_path))


def write_shards(folder, **moved):
    """Two shards and their index; `moved` changes which file the index names for a tensor."""
    files = {name: f"model-0000{i + 1}-of-00002.safetensors" for i, name in enumerate(STATE)}
    for name, file in files.items():
        safetensors_torch.save_file({name: STATE[name]}, folder / file)
    index = {"weight_map": files | moved}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(files.values())


def test_a_single_file_counts_before_an_index(tmp_path):
    write_shards(tmp_path)
    changed = {name: x + 1 for name, x in STATE.items()}
    safetensors_torch.save_file(changed, tmp_path / "model.safetensors")
    check(readers.read(tmp_path), changed)  # as transformers does
    check(readers.read(tmp_path / "model.safetensors.index.json"))


def test_shards_without_an_index(tmp_path):
    first, second = write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    check(readers.read(tmp_path))
    (tmp_path / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"missing shards: {first}"):
        readers.read(tmp_path)
    (tmp_path / first).write_bytes((tmp_path / second).read_bytes())
    with pytest.raises(errors.WeightsError, match="are in another shard too"):
        readers.read(tmp_path)


def test_tensors_that_the_index_forgot_come_along(tmp_path):
    first, _ = write_shards(tmp_path)
    name = next(iter(STATE))
    more = {name: STATE[name], "inv_freq": torch.ones(2)}
    safetensors_torch.save_file(more, tmp_path / first)
    check(readers.read(tmp_path), STATE | {"inv_freq": torch.ones(2)})


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "../x.safetensors",
        "/etc/x.bin",
        "a/b.bin",
        "..\\x.bin",
        "model.safetensors.index.json",
        3,
    ],
)
def test_an_index_stays_in_its_folder(tmp_path, name):
    write_shards(tmp_path, more=name)
    with pytest.raises(errors.WeightsError, match="must be plain file names of weights"):
        readers.read(tmp_path)


@pytest.mark.parametrize("content, message", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pull|lfs pu"),
    (b"<!DOCTYPE html><html>Access denied</html>", "is a web page"),
    (b"\n <html>", "is a web page"),
    (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page"),
    (b"", "is empty"),
])  # fmt: skip
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "x.bin", "x.gguf", "params::streaming", "model.safetensors.index.json"],
)
def test_what_is_there_instead_of_weights(tmp_path, name, content, message):
    prefix, _, file = name.rpartition("::")
    (tmp_path / file).write_bytes(content)
    path = f"{prefix}::{tmp_path / file}" if prefix else tmp_path / file
    with pytest.raises(errors.WeightsError, match=message):
        readers.read(path)


def test_files_of_training_say_what_was_taken(tmp_path):
    torch.save({"model": STATE, "model_ema": STATE, "optimizer": {"state": {}}}, tmp_path / "a.pth")
    tensors = readers.read(tmp_path / "a.pth")
    check(tensors)
    assert tensors.source.endswith("a.pth, its 'model'")
    lightning = {"state_dict": {f"model.{name}": x for name, x in STATE.items()}, "epoch": 3}
    torch.save(lightning, tmp_path / "last.ckpt")
    check(readers.read(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_scripts_keep_beside_the_tensors(tmp_path, legacy):
    beside = {
        "args": argparse.Namespace(lr=1, name="x"),
        "best": np.float64(3.0),
        "step": np.int32(7),
        "half": np.float16(1),
    }
    file = tmp_path / "a.pth"
    torch.save({"model": STATE, **beside}, file, _use_new_zipfile_serialization=not legacy)
    check(readers.read(file))
    torch.save({"model": STATE, "when": pathlib.PurePosixPath("x")}, file)
    with pytest.raises(errors.WeightsError, match="it asks for pathlib.PurePosixPath"):
        readers.read(file)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 2).to_sparse(),
        torch.ones(1).expand(1000, 1000),
        torch.empty(2, 2, device="meta"),
    ],
    ids=["sparse", "expanded", "meta"],
)
def test_tensors_that_hold_no_plain_values(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "a.pth")
    with pytest.raises(errors.WeightsError, match="a.pth"):
        readers.read(tmp_path / "a.pth")


def test_dtypes_newer_than_the_reader_are_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(errors.WeightsError, match="w has the dtype 'F4'.*it knows F64, F32"):
        readers.read(file)
