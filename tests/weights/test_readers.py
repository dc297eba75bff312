"""Every format gives the same tensors; damaged, unknown and unsafe files are refused by name."""

import json
import os
import pickle
import struct

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization

from vlm_jax.weights import errors, gguf, readers

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([1.5, -2.0], ml_dtypes.bfloat16)


def safetensors_bytes(tensors, codes):
    header, blobs, offset = {}, [], 0
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": codes[name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        blobs.append(raw)
        offset += len(raw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


@pytest.fixture
def single(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes({"a": A, "b": B}, {"a": "F32", "b": "BF16"}))
    return file


def check(tensors, names=("a", "b")):
    assert sorted(tensors) == sorted(names)
    np.testing.assert_array_equal(tensors[names[0]], A)
    np.testing.assert_array_equal(tensors[names[1]], B)
    assert tensors[names[0]].dtype == np.float32
    assert tensors[names[1]].dtype == ml_dtypes.bfloat16


# ---- safetensors ----


def test_safetensors_file_and_folder(single):
    check(readers.read(single))
    check(readers.read(single.parent))


def test_safetensors_agrees_with_the_public_writer(tmp_path):
    public = pytest.importorskip("safetensors.numpy")
    public.save_file({"x": A, "n": np.array(7)}, tmp_path / "x.safetensors")
    tensors = readers.read(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(tensors["x"], A)
    assert tensors["n"].shape == () and tensors["n"] == 7


@pytest.fixture
def sharded(tmp_path):
    names = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    (tmp_path / names[0]).write_bytes(safetensors_bytes({"a": A}, {"a": "F32"}))
    (tmp_path / names[1]).write_bytes(safetensors_bytes({"b": B}, {"b": "BF16"}))
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    return index


def test_sharded_safetensors(sharded):
    check(readers.read(sharded))
    check(readers.read(sharded.parent))


def test_missing_shard_is_named(sharded):
    (sharded.parent / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="m-00002-of-00002.safetensors"):
        readers.read(sharded)


def test_index_that_disagrees_with_its_shards(sharded):
    content = json.loads(sharded.read_text())
    content["weight_map"]["ghost"] = "m-00001-of-00002.safetensors"
    sharded.write_text(json.dumps(content))
    with pytest.raises(errors.WeightsError, match="ghost"):
        readers.read(sharded)


def test_index_cannot_point_out_of_its_folder(sharded):
    sharded.write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
    with pytest.raises(errors.WeightsError, match="plain file names"):
        readers.read(sharded)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_safetensors(single, keep):
    single.write_bytes(single.read_bytes()[:keep])
    with pytest.raises(errors.WeightsError, match=r"model.safetensors.*cut off"):
        readers.read(single)


def test_safetensors_of_something_else(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 4) + b"[1] " + bytes(40))
    with pytest.raises(errors.WeightsError, match="not a safetensors file"):
        readers.read(file)


# ---- paths ----


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*nope.safetensors"):
        readers.read(tmp_path / "nope.safetensors")


def test_folder_without_weights(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no weights; looked for \*.safetensors"):
        readers.read(tmp_path)


def test_ambiguous_folder(single):
    (single.parent / "other.safetensors").write_bytes(single.read_bytes())
    with pytest.raises(errors.WeightsError, match="model.safetensors, other.safetensors; name one"):
        readers.read(single.parent)


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("model.h5", "unknown extension '.h5'; expected .safetensors, .bin"),
        ("streaming_params", "params::"),
        ("x.msgpack", "flax_params::"),
    ],
)
def test_unknown_extension_names_the_remedy(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(b"123")
    with pytest.raises(errors.WeightsError, match=remedy):
        readers.read(tmp_path / name)


def test_unknown_prefix(single):
    with pytest.raises(
        errors.WeightsError, match="unknown prefix 'param'.*trainstate_params, params"
    ):
        readers.read(f"param::{single}")


# ---- torch ----


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pth", "x.pt"])
def test_torch(tmp_path, name):
    torch = pytest.importorskip("torch")
    state = {"a": torch.tensor(A), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    torch.save(state, tmp_path / name)
    check(readers.read(tmp_path / name))
    torch.save({"state_dict": state}, tmp_path / name)
    check(readers.read(tmp_path))


def test_torch_without_zip_container(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "old.pth"
    state = {"a": torch.tensor(A), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    torch.save(state, file, _use_new_zipfile_serialization=False)
    check(readers.read(file))


def test_sharded_torch(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.tensor(A)}, tmp_path / "m-1.bin")
    torch.save({"b": torch.tensor([1.5, -2.0]).bfloat16()}, tmp_path / "m-2.bin")
    index = {"weight_map": {"a": "m-1.bin", "b": "m-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check(readers.read(tmp_path))


class Trap:
    """Touches a file when unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["bare", "zip", "legacy"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, form):
    torch = pytest.importorskip("torch")
    file, witness = tmp_path / "evil.pth", tmp_path / "witness"
    state = {"a": torch.tensor(A), "evil": Trap(witness)}
    if form == "bare":
        file.write_bytes(pickle.dumps(state["evil"]))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(errors.WeightsError, match=r"evil.pth: refused.*resave it as safetensors"):
        readers.read(file)
    assert not witness.exists()


def test_truncated_torch(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "x.pth"
    torch.save({"a": torch.tensor(A)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(errors.WeightsError, match="x.pth: refused"):
        readers.read(file)


def test_torch_that_is_no_state_dict(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "x.pth"
    torch.save({"a": torch.tensor(A), "epoch": 3}, file)
    with pytest.raises(errors.WeightsError, match=r"\['epoch'\] are not tensors"):
        readers.read(file)


def test_torch_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "x.bin").write_bytes(b"PK")
    with pytest.raises(errors.WeightsError, match="pip install torch"):
        readers.read(tmp_path / "x.bin")


# ---- flax and EasyLM msgpack ----


def write_stream(file, leaves):
    packer = msgpack.Packer()
    with open(file, "wb") as stream:
        for path, value in leaves.items():
            stream.write(packer.pack((path.split("/"), serialization.to_bytes(value))))


def test_stream_of_params(tmp_path):
    file = tmp_path / "streaming_params"
    write_stream(file, {"w/a": A, "w/b": B})
    check(readers.read(f"params::{file}"), ("w/a", "w/b"))


def test_stream_of_a_training_state(tmp_path):
    file = tmp_path / "streaming_train_state"
    write_stream(
        file,
        {
            "step": np.int32(3),
            "params/params/a": A,
            "params/params/b": B,
            "opt_state/0/mu/params/a": A,
        },
    )
    whole = readers.read(f"trainstate::{file}")
    assert list(whole) == [
        "step",
        "params/params/a",
        "params/params/b",
        "opt_state/0/mu/params/a",
    ]
    assert whole["step"] == 3
    check(readers.read(f"trainstate_params::{file}"))


def test_params_stream_read_as_training_state(tmp_path):
    file = tmp_path / "s"
    write_stream(file, {"w/a": A})
    with pytest.raises(
        errors.WeightsError, match=r"no path begins with 'params/params/'; paths: \['w/a'"
    ):
        readers.read(f"trainstate_params::{file}")


def test_nested_flax_params(tmp_path):
    file = tmp_path / "p.msgpack"
    file.write_bytes(serialization.to_bytes({"x": {"a": A}, "b": B}))
    check(readers.read(f"flax_params::{file}"), ("x/a", "b"))


def test_chunked_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 8)  # flax: 1 GiB
    file = tmp_path / "p.msgpack"
    raw = serialization.to_bytes({"x": {"a": A.copy()}, "b": B})
    assert b"__msgpack_chunked_array__" in raw
    file.write_bytes(raw)
    check(readers.read(f"flax_params::{file}"), ("x/a", "b"))
    write_stream(file, {"a": A.copy(), "b": B})
    check(readers.read(f"params::{file}"))


@pytest.mark.parametrize("kind", ["params", "trainstate", "flax_params"])
def test_truncated_msgpack(tmp_path, kind):
    file = tmp_path / "p"
    if kind == "flax_params":
        file.write_bytes(serialization.to_bytes({"x": {"a": A}, "b": B}))
    else:
        write_stream(file, {"a": A, "b": B})
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(errors.WeightsError, match="cut off"):
        readers.read(f"{kind}::{file}")


def test_msgpack_behind_the_wrong_prefix(tmp_path):
    write_stream(tmp_path / "s", {"a": A})
    with pytest.raises(errors.WeightsError, match="not the kind of msgpack"):
        readers.read(f"flax_params::{tmp_path / 's'}")
    (tmp_path / "p").write_bytes(serialization.to_bytes({"a": A}))
    with pytest.raises(errors.WeightsError, match="not the kind of msgpack"):
        readers.read(f"params::{tmp_path / 'p'}")


# ---- GGUF ----


def gguf_bytes(tensors, metadata):
    """tensors: name -> (ggml type, shape outermost first, raw bytes)."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, list):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        else:
            out += struct.pack("<II", 4, value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        out += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return out + bytes(-len(out) % 32) + data


def test_gguf_blocks_by_hand(tmp_path):
    half = np.float16(0.5).tobytes()
    # byte i holds value i in its low nibble and 15 - i in its high one
    nibbles = bytes(i | (15 - i) << 4 for i in range(16))
    tensors = {
        "q4_0": (2, (1, 32), half + nibbles),
        "q4_1": (3, (32,), half + np.float16(-1).tobytes() + nibbles),
        "q8_0": (8, (32,), half + np.arange(-16, 16, dtype=np.int8).tobytes()),
        "f32": (0, (2, 3), A.tobytes()),
        "f16": (1, (2, 3), A.astype(np.float16).tobytes()),
        "bf16": (30, (2,), B.tobytes()),
    }
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf_bytes(tensors, {"k": 7, "words": ["a", "bc"], "s": "t"}))
    read = readers.read(file)
    assert read.metadata == {"k": 7, "words": ["a", "bc"], "s": "t"}
    up, down = np.arange(16), np.arange(15, -1, -1)
    both = np.concatenate([up, down])
    np.testing.assert_array_equal(read["q4_0"], ((both - 8) * 0.5)[None])
    np.testing.assert_array_equal(read["q4_1"], both * 0.5 - 1)
    np.testing.assert_array_equal(read["q8_0"], np.arange(-16, 16) * 0.5)
    for name in ("f32", "f16"):
        np.testing.assert_array_equal(read[name], A)
    np.testing.assert_array_equal(read["bf16"], [1.5, -2.0])
    assert {read[name].dtype for name in read} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_agrees_with_the_public_package(kind):
    public = pytest.importorskip("gguf")
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    raw = public.quantize(values, public.GGMLQuantizationType[kind])
    ours = gguf.dequantise(raw.ravel(), kind).reshape(4, 64)
    expected = public.dequantize(raw, public.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("keep", [10, 40, 90, -20])
def test_truncated_gguf(tmp_path, keep):
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf_bytes({"f32": (0, (2, 3), A.tobytes())}, {"k": 7})[:keep])
    with pytest.raises(errors.WeightsError, match="x.gguf: (cut off|not a GGUF)"):
        readers.read(file)


def test_gguf_refusals(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(bytes(100))
    with pytest.raises(errors.WeightsError, match="not a GGUF file"):
        readers.read(file)
    file.write_bytes(gguf_bytes({"w": (12, (256,), bytes(144))}, {}))
    with pytest.raises(errors.WeightsError, match=r"'w' has ggml type 12; supported: F32, F16"):
        readers.read(file)
