"""What is written, other programs read; nothing half-written is left behind."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from vlm_jax.nn import functional
from vlm_jax.weights import export, llama, readers


@pytest.fixture(scope="module")
def loaded(golden_lvm):
    fields = json.loads((golden_lvm / "config.json").read_text())["llama"]
    return llama.load(golden_lvm / "llama.safetensors", llama.config_from_hf(fields))


def test_hf_round_trip_is_bit_equal(tmp_path, golden_lvm, loaded):
    cfg, params = loaded
    digests = export.write(tmp_path, export.hf(llama, params, cfg))
    assert list(digests) == ["model.safetensors"]
    source, back = readers.read(golden_lvm / "llama.safetensors"), readers.read(tmp_path)
    assert sorted(source) == sorted(back)
    for name in source:
        assert back[name].dtype == source[name].dtype
        np.testing.assert_array_equal(back[name], source[name])


def test_native_round_trip(tmp_path, loaded):
    cfg, params = loaded
    export.write(tmp_path, export.native("lvm", params, cfg), max_shard_bytes=50_000)
    assert len(list(tmp_path.glob("params-*-of-*.safetensors"))) > 2
    got, back = llama.load(tmp_path)
    assert got == cfg
    for path, array in functional.flatten(params).items():
        np.testing.assert_array_equal(functional.flatten(back)[path], array)


@pytest.mark.slow
def test_transformers_reads_it_and_never_stops_at_code_2(tmp_path, golden_lvm, loaded):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    cfg, params = loaded
    export.write(tmp_path, export.hf(llama, params, cfg), max_shard_bytes=100_000)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert network.dtype == torch.float32
    assert network.config.eos_token_id is None and network.config.bos_token_id is None
    assert network.generation_config.eos_token_id is None
    arrays = np.load(golden_lvm / "io.npz")
    with torch.no_grad():
        logits = network(torch.tensor(arrays["lm.input_ids"])).logits.numpy()
    np.testing.assert_allclose(logits, arrays["lm.logits"], atol=2e-4)


def test_dtype_and_text_ids(tmp_path, loaded):
    cfg, params = loaded
    checkpoint = export.hf(llama, params, cfg, "bfloat16", bos_token_id=1, eos_token_id=2)
    export.write(tmp_path, checkpoint)
    assert readers.read(tmp_path)["lm_head.weight"].dtype == ml_dtypes.bfloat16
    for file in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / file).read_text())
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_public_reader_agrees(tmp_path, loaded):
    public = pytest.importorskip("safetensors.numpy")
    cfg, params = loaded
    export.write(tmp_path, export.hf(llama, params, cfg))
    tensors = public.load_file(tmp_path / "model.safetensors")
    ours = readers.read(tmp_path)
    assert tensors.keys() == set(ours)
    np.testing.assert_array_equal(tensors["lm_head.weight"], ours["lm_head.weight"])


def test_nothing_is_overwritten(tmp_path, loaded):
    cfg, params = loaded
    export.write(tmp_path, export.hf(llama, params, cfg))
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="already holds model.safetensors"):
        export.write(tmp_path, export.hf(llama, params, cfg))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_failed_write_leaves_no_checkpoint(tmp_path, loaded):
    cfg, params = loaded
    checkpoint = export.hf(llama, params, cfg)

    def full():
        raise OSError(28, "No space left on device")

    tensors = dict(checkpoint.tensors) | {"lm_head.weight": full}
    broken = dataclasses.replace(checkpoint, tensors=tensors)
    with pytest.raises(OSError, match="No space left"):
        export.write(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []
