"""Files made to harm: every reader names the error in bounded time and memory, and runs nothing."""

import io
import json
import os
import pickle
import resource
import struct
import time
import zipfile

import msgpack
import numpy as np
import pytest
from flax import serialization

from vlm_jax.weights import bert, bounds, errors, lazy, llama, lpips, readers, torchscript
from vlm_jax.weights import vqgan as vqgan_weights

ARRAYS = {"a.weight": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones(5, np.float16)}


# ---- files -----------------------------------------------------------------------------------


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_safetensors(folder):
    from safetensors.numpy import save_file

    save_file(ARRAYS, folder / "x.safetensors")
    return "", folder / "x.safetensors"


def write_torch(folder):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.tensor(x) for name, x in ARRAYS.items()}, folder / "x.pth")
    return "", folder / "x.pth"


def write_legacy(folder):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(x) for name, x in ARRAYS.items()}
    torch.save(state, folder / "x.pth", _use_new_zipfile_serialization=False)
    return "", folder / "x.pth"


class Opcodes:
    """Writes the pickle of a TorchScript module by hand."""

    def __init__(self, offset=0, shape=(4, 3), strides=(3, 1), key="0", storage="FloatStorage"):
        pid = ("storage", _Global(f"torch\n{storage}"), key, "cpu", 12)
        args = (pid, offset, shape, strides, False)
        self.raw = (
            b"\x80\x02c__torch__\nNet\n)\x81}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
            + self._tuple(args[0])
            + b"Q"
            + b"".join(map(self._value, args[1:]))
            + b"tRsb."
        )

    def _tuple(self, values):
        return b"(" + b"".join(map(self._value, values)) + b"t"

    def _value(self, value):
        if isinstance(value, _Global):
            return b"c" + value.name.encode() + b"\n"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            return b"I%d\n" % value
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            return b"X" + struct.pack("<I", len(value)) + value.encode()
        return self._tuple(value)


class _Global:
    def __init__(self, name):
        self.name = name


def write_archive(folder, content=None, data=None, compression=zipfile.ZIP_STORED):
    """A TorchScript archive: one module with one tensor `w` over a storage of 12 floats."""
    file = folder / "x.pt"
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("n/data.pkl", Opcodes().raw if content is None else content)
        archive.writestr(
            "n/data/0", np.arange(12, dtype=np.float32).tobytes() if data is None else data
        )
        archive.writestr("n/constants.pkl", b"\x80\x02).")
    return "", file


def write_stream(folder):
    file = folder / "streaming_params"
    with open(file, "wb") as stream:
        for name, x in ARRAYS.items():
            leaf = serialization.to_bytes(x)
            stream.write(msgpack.packb((tuple(name.split(".")), leaf)))
    return "params::", file


def write_nested(folder):
    file = folder / "p.msgpack"
    file.write_bytes(serialization.to_bytes({"x": {"a": ARRAYS["a.weight"]}, "b": ARRAYS["b"]}))
    return "flax_params::", file


def write_gguf(folder):
    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    out += text("general.alignment") + struct.pack("<II", 4, 32)
    out += text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
    out += text("a.weight") + struct.pack("<IQQIQ", 2, 3, 4, 0, 0)
    file = folder / "x.gguf"
    file.write_bytes(out + bytes(-len(out) % 32) + ARRAYS["a.weight"].tobytes())
    return "", file


def write_index(folder):
    write_safetensors(folder)
    file = folder / "x.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": dict.fromkeys(ARRAYS, "x.safetensors")}))
    return "", file


WRITERS = [
    write_safetensors,
    write_torch,
    write_legacy,
    write_archive,
    write_stream,
    write_nested,
    write_gguf,
    write_index,
]


# ---- mutations -------------------------------------------------------------------------------


def mutated(content, rng):
    """Bytes changed, cut, repeated, or overwritten with numbers that mean much in headers."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(content) + 1))
        match rng.integers(5):
            case 0:
                content[place : place + 1] = bytes([rng.integers(256)])
            case 1:
                del content[place:]
            case 2:
                content[place:place] = content[max(place - 16, 0) : place]
            case 3:
                number = int(rng.choice([0, 1, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1]))
                content[place : place + 8] = number.to_bytes(8, "little")
            case _:
                content[place : place + 4] = rng.bytes(4)
    return bytes(content)


@pytest.fixture
def watched():
    """Fails where a test takes seconds of the processor or gigabytes."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert time.process_time() - begin < 60 and grown < 2**20  # KiB


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__[6:])
def test_mutated_files_are_read_or_named(tmp_path, watched, write):
    prefix, file = write(tmp_path)
    good = {name: x.tobytes() for name, x in readers.read(f"{prefix}{file}").items()}
    assert good
    content, rng = file.read_bytes(), np.random.default_rng(0)
    for _ in range(150 if "torch" in write.__name__ or write is write_legacy else 400):
        file.write_bytes(mutated(content, rng))
        try:
            tensors = readers.read(f"{prefix}{file}")
            sizes = [tensors[name].nbytes for name in tensors]
        except (errors.WeightsError, FileNotFoundError):
            continue
        assert sum(sizes) <= 10 * len(content)  # never more than there is


def test_mutated_pickles_of_arrays(watched):
    arrays = {"a": {"b": ARRAYS["a.weight"], "c": np.ones(3, ">f8")}}
    content, rng = pickle.dumps(arrays), np.random.default_rng(0)
    for _ in range(600):
        try:
            lpips.read_pickled_arrays(mutated(content, rng), "x.ckpt")
        except errors.WeightsError:
            pass


@pytest.mark.parametrize(
    "read, fields",
    [
        (llama.config_from_hf, llama.config_to_hf(llama.PRESETS["lvm_debug"])),
        (vqgan_weights.config_from_hf, vqgan_weights.config_to_hf(vqgan_weights.PRESETS["tiny"])),
        (
            bert.config_from_hf,
            dict(
                vocab_size=9,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
                max_position_embeddings=8,
                type_vocab_size=2,
                layer_norm_eps=1e-12,
            ),
        ),
    ],
    ids=["llama", "vqgan", "bert"],
)
def test_configs_that_ask_for_what_cannot_be(tmp_path, watched, read, fields):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields))
    readers.read_config(file, llama.llama.LlamaConfig, read)
    odd = (1e30, 10**30, -1, 0, "x" * 100, [1e300], [10**9] * 100, {"a": {}}, 2**40, True)
    for name in fields:
        for value in odd:
            file.write_text(json.dumps(fields | {name: value}))
            try:
                readers.read_config(file, llama.llama.LlamaConfig, read)
            except errors.WeightsError as error:
                assert str(file) in str(error)


# ---- one by one ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        dict(offset=-1),
        dict(offset=1),
        dict(offset=2**62),
        dict(strides=(-3, 1)),
        dict(strides=(3, 2**60)),
        dict(strides=(4, 1)),
        dict(shape=(-4, -3)),
        dict(shape=(4, 4)),
        dict(shape=(2**40, 2**40)),
        dict(shape=(10**6, 10**6), strides=(0, 0)),
        dict(offset=0.5),
        dict(shape=(4.0, 3)),
        dict(strides=(3,)),
        dict(shape=(1,) * 40, strides=(1,) * 40),
        dict(key="1"),
        dict(key="../data.pkl"),
    ],
    ids=str,
)
def test_views_that_leave_their_storage(tmp_path, fields):
    _, file = write_archive(tmp_path, Opcodes(**fields).raw)
    with pytest.raises(errors.WeightsError, match="x.pt"):
        np.asarray(torchscript.read(file)["w"])


def test_views_of_a_storage(tmp_path):
    """What the refusals above leave: parts and transposes."""
    _, file = write_archive(tmp_path, Opcodes(2, (2, 3), (1, 3)).raw)
    np.testing.assert_array_equal(torchscript.read(file)["w"], [[2, 5, 8], [3, 6, 9]])
    _, file = write_archive(tmp_path, Opcodes(11, (), ()).raw)
    assert torchscript.read(file)["w"] == 11 and torchscript.read(file)["w"].shape == ()
    _, file = write_archive(tmp_path, Opcodes(12, (0, 3), (3, 1)).raw)
    assert torchscript.read(file)["w"].shape == (0, 3)


def shared_modules(depth):
    """A pickle of a few hundred bytes: 2 ** depth names for one tensor."""
    module = b"c__torch__\nNet\n)\x81"
    out = b"\x80\x02" + module + b"}bq\x00"
    for i in range(depth):
        got = b"h" + bytes([i])
        pair = b"}(X\x01\x00\x00\x00a" + got + b"X\x01\x00\x00\x00b" + got + b"u"
        out += b"0" + module + pair + b"bq" + bytes([i + 1])
    return out + b"."


@pytest.mark.parametrize(
    "content",
    [
        shared_modules(60),
        b"\x80\x02r\xff\xff\xff\x7f.",  # remembers object 2**31
        b"\x80\x02p9999999999\n.",
        b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b".",  # an array of bytes of 1 TiB
        b"\x80\x02" + b"]" * 3_000_000 + b".",
        b"\x80\x02" + b"(" * 100_000 + b".",
    ],
    ids=["shared", "memo", "memo in text", "bytes", "many", "marks"],
)
def test_pickles_that_would_take_for_ever(tmp_path, watched, content):
    _, file = write_archive(tmp_path, content)
    with pytest.raises(errors.WeightsError, match="x.pt"):
        torchscript.read(file)
    with pytest.raises(errors.WeightsError, match="x.ckpt"):
        lpips.read_pickled_arrays(content, "x.ckpt")


def test_arrays_that_a_pickle_shares_without_end(watched):
    content = b"\x80\x02}q\x00"
    for i in range(60):
        pair = b"(X\x01\x00\x00\x00ah" + bytes([i]) + b"X\x01\x00\x00\x00bh" + bytes([i]) + b"u"
        content += b"0}" + pair + b"q" + bytes([i + 1])
    with pytest.raises(errors.WeightsError, match="too many or too deep"):
        lpips.read_pickled_arrays(content + b".", "x.ckpt")


def test_a_pickled_array_that_claims_more_than_it_holds(watched):
    content = pickle.dumps({"a": np.ones(3, np.float32)}, protocol=3)
    claimed = content.replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85")
    assert claimed != content
    with pytest.raises(errors.WeightsError, match="x.ckpt"):
        lpips.read_pickled_arrays(claimed, "x.ckpt")


@pytest.mark.parametrize("part", ["content", "data"])
def test_archives_that_inflate(tmp_path, watched, part):
    bomb = bytes(20 * 2**20)
    _, file = write_archive(tmp_path, **{part: bomb}, compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 2**20
    with pytest.raises(errors.WeightsError, match="inflates to 20,971,520 bytes"):
        np.asarray(torchscript.read(file)["w"])
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "y.pth", "w") as new:
        for name in ("n/data.pkl", "n/data/0"):
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(errors.WeightsError, match="inflates to"):
        readers.read(tmp_path / "y.pth")


def test_a_damaged_member_is_named(tmp_path):
    _, file = write_archive(tmp_path)
    raw = bytearray(file.read_bytes())
    place = raw.index(np.arange(12, dtype=np.float32).tobytes())
    raw[place + 5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(errors.WeightsError, match="w cannot be read .*Bad CRC"):
        torchscript.read(file)["w"]


@pytest.mark.parametrize(
    "entry",
    [
        dict(shape=[-2, -3]),
        dict(shape=[2.0, 3]),
        dict(shape=[True, 6]),
        dict(shape="23"),
        dict(shape=[1] * 60 + [6]),
        dict(shape=[0, 2**62, 2**62]),
        dict(data_offsets=[-24, 0]),
        dict(data_offsets=[0.0, 24]),
        dict(data_offsets=[24, 0]),
        dict(data_offsets=[0, 24, 24]),
        dict(dtype=None),
        dict(dtype=["F32"]),
        dict(more=1),
    ],
    ids=str,
)
def test_safetensors_entries_of_wrong_types(tmp_path, entry):
    good = dict(dtype="F32", shape=[2, 3], data_offsets=[0, 24])
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors_bytes({"w": good | entry}, bytes(24)))
    with pytest.raises(errors.WeightsError, match="x.safetensors"):
        np.asarray(readers.read(file)["w"])


DEEP = b'{"a":' * 100_000


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        b"[" * 100_000,
        b"3",
        b"\xff\xfe",
        b'{"w": 1, "w": 2}',
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
    ids=["deep", "lists", "number", "bytes", "twice", "digits"],
)
def test_json_that_is_none(tmp_path, watched, text):
    file, index, config = (
        tmp_path / name for name in ("x.safetensors", "m.bin.index.json", "config.json")
    )
    file.write_bytes(safetensors_bytes(text))
    index.write_bytes(text)
    config.write_bytes(text)
    for read in (
        lambda: readers.read(file),
        lambda: readers.read(index),
        lambda: readers.read_config(config, dict, dict),
    ):
        with pytest.raises(errors.WeightsError, match=str(tmp_path)):
            read()


@pytest.mark.parametrize("dtype", ["O", "S8", "M8[s]", "V4", "complex64", "f4,f4", 3, None])
def test_msgpack_arrays_of_foreign_dtypes(tmp_path, dtype):
    leaf = msgpack.ExtType(1, msgpack.packb(((2,), dtype, bytes(16))))
    (tmp_path / "p").write_bytes(msgpack.packb({"a": leaf}))
    with pytest.raises(errors.WeightsError, match="p: a |p: an|of dtype"):
        readers.read(f"flax_params::{tmp_path / 'p'}")["a"]


def test_msgpack_with_bytes_behind_it_or_without_end(tmp_path, watched):
    file = tmp_path / "p"
    file.write_bytes(serialization.to_bytes({"a": ARRAYS["b"]}) + b"\0")
    with pytest.raises(errors.WeightsError, match="1 bytes behind the tree"):
        readers.read(f"flax_params::{file}")
    file.write_bytes(b"\x81\xa1a" * 100_000)
    with pytest.raises(errors.WeightsError, match="nested more than"):
        readers.read(f"flax_params::{file}")
    file.write_bytes(b"\x92\xdd\xff\xff\xff\xff\xa1a")  # a path of 2**32 names
    with pytest.raises(errors.WeightsError, match="a path of|cut off"):
        readers.read(f"params::{file}")
    file.write_bytes(msgpack.packb({"a": "text"}))
    with pytest.raises(errors.WeightsError, match="no array of numbers but a str"):
        readers.read(f"flax_params::{file}")["a"]


GGUF = {
    "general.architecture": "llama", "llama.embedding_length": 8, "llama.block_count": 1,
    "llama.feed_forward_length": 16, "llama.attention.head_count": 2, "llama.context_length": 32,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 10,
}  # fmt: skip


@pytest.mark.parametrize("name", list(GGUF)[1:])
@pytest.mark.parametrize("value", [0, "text", [1], 2**40, -1, 1.5, None])
def test_gguf_metadata_of_wrong_type_or_size(name, value):
    tensors = lazy.Tensors(
        {"token_embd.weight": lambda: np.ones((10, 8))}, "x.gguf", GGUF | {name: value}
    )
    if name == "llama.attention.layer_norm_rms_epsilon" and isinstance(value, int | float):
        return  # a number is a number
    with pytest.raises(errors.WeightsError):
        cfg = llama.config_of(tensors, "x.gguf")
        llama.from_tensors(tensors, cfg)


@pytest.mark.parametrize("alignment", [0, -32, "32", 1.5])
def test_gguf_alignment(tmp_path, alignment):
    _, file = write_gguf(tmp_path)
    raw = file.read_bytes()
    old = struct.pack("<II", 4, 32)
    code, form = {int: (5, "<Ii"), str: (8, "<IQ2s"), float: (6, "<If")}[type(alignment)]
    values = (2, b"32") if isinstance(alignment, str) else (alignment,)
    file.write_bytes(raw.replace(old, struct.pack(form, code, *values), 1))
    with pytest.raises(errors.WeightsError, match="general.alignment is"):
        readers.read(file)


def test_a_prefix_of_nothing_but_zeros(tmp_path):
    for name in ("x.gguf", "x.safetensors", "x.pth", "x.pt"):
        (tmp_path / name).write_bytes(bytes(1000))
        with pytest.raises(errors.WeightsError, match=name):
            list(readers.read(tmp_path / name))


def test_pickles_in_use_are_far_below_the_bounds(tmp_path):
    torch = pytest.importorskip("torch")
    state = {f"layers.{i}.weight": torch.zeros(1) for i in range(10_000)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        bounds.check_pickle(archive.read(name))
    assert not os.listdir(tmp_path)
