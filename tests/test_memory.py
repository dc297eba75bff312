"""What is free, and what is said before it is taken."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import vlm_jax
from tests import tiny_system
from vlm_jax.machines import memory
from vlm_jax.program import optim, sharding, train, update
from vlm_jax.systems import lvm
from vlm_jax.weights import convert, llama

GIB = 2**30


def machine(root, available_kb=None, cgroup="", **files):
    """A file system that tells of memory."""
    (root / "proc" / "self").mkdir(parents=True)
    if available_kb is not None:
        text = f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   {available_kb} kB\n"
        (root / "proc" / "meminfo").write_text(text)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.mark.parametrize("cgroup, files, free", [
    ("", {}, 4000 * 1024),
    # Version 2: what can be reclaimed counts as free; the limit of a parent counts.
    ("0::/a/b\n", {"a__b__memory.max": "1000000\n", "a__b__memory.current": "900000\n",
                   "a__b__memory.stat": "anon 1\ninactive_file 50000\n"}, 150_000),
    ("0::/a/b\n", {"a__b__memory.max": "max\n", "a__b__memory.current": "5\n",
                   "a__memory.max": "1000\n", "a__memory.current": "400\n"}, 600),
    # A container sees its own group at the top.
    ("0::/docker/x\n", {"memory.max": "1000\n", "memory.current": "100\n"}, 900),
    ("4:memory:/x\n0::/\n", {"memory__x__memory.limit_in_bytes": "1000\n",
                             "memory__x__memory.usage_in_bytes": "300\n",
                             "memory__x__memory.stat": "total_inactive_file 7\n"}, 707),
    ("4:cpu,memory:/\n", {"memory__memory.limit_in_bytes": "9223372036854771712\n",
                          "memory__memory.usage_in_bytes": "300\n"}, 4000 * 1024),
    ("0::/\n", {"memory.max": "100\n", "memory.current": "300\n"}, 0),  # over its limit
    ("nonsense", {}, 4000 * 1024),
])  # fmt: skip
def test_what_is_free(tmp_path, cgroup, files, free):
    assert memory.host_free(machine(tmp_path, 4000, cgroup, **files)) == free


def test_where_it_is_not_known(tmp_path):
    assert memory.host_free(machine(tmp_path)) is None
    assert memory.device_free(jax.devices("cpu")[0]) is None


def test_of_this_machine():
    free = memory.host_free()
    assert free is None or 0 <= free < 2**50


class Device:
    """An accelerator of which two GiB are free."""

    platform, device_kind = "gpu", "Fake"

    def memory_stats(self):
        return {"bytes_limit": 3 * GIB, "bytes_in_use": GIB}


SHAPES = {"a": jax.ShapeDtypeStruct((2**28,), np.float32)}  # one GiB


@pytest.fixture
def free(monkeypatch):
    def pretend(host, device=None):
        monkeypatch.setattr(memory, "host_free", lambda root="/": host)
        if device:
            monkeypatch.setattr(jax, "local_devices", lambda: [device])

    return pretend


def test_loading_what_fits_not(free, monkeypatch):
    free(int(1.5 * GIB))
    memory.require_for_loading("x", SHAPES)
    with pytest.raises(memory.NotEnoughMemory) as caught:
        memory.require_for_loading("x", SHAPES, copy_dtype="float32")
    for text in (
        "x needs 2.00 GiB of host memory",
        "268,435,456 parameters",
        "1.00 GiB as held",
        "1.00 GiB in float32 to compute with",
        "1.50 GiB are free",
        'dtype="bfloat16"',
    ):
        assert text in str(caught.value)
    monkeypatch.setenv("VLM_JAX_MEMORY_CHECK", "0")
    memory.require_for_loading("x", SHAPES, copy_dtype="float32")


def test_loading_onto_a_device(free):
    free(int(1.5 * GIB), Device())
    memory.require_for_loading("x", SHAPES, copy_dtype="float32")  # the copy is the device's
    big = {"a": jax.ShapeDtypeStruct((2**28 + 2**27,), np.float32)}
    with pytest.raises(memory.NotEnoughMemory, match="2.25 GiB of Fake memory.*2.00 GiB are free"):
        memory.require_for_loading("x", big, copy_dtype="bfloat16")
    free(None, Device())
    memory.require_for_loading("x", SHAPES)


def test_nothing_is_read_before(free, golden_nxtp, tmp_path, monkeypatch):
    vlm_jax.load("vqgan", "tiny").save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer.model").write_bytes((golden_nxtp / "tokenizer.model").read_bytes())
    sizes = dict(dim=64, n_layers=2, n_heads=4, multiple_of=32, norm_eps=1e-5, vocab_size=-1)
    (tmp_path / "params.json").write_text(json.dumps(sizes))
    monkeypatch.setattr(convert, "_misfit", lambda *_: pytest.fail("a tensor was read"))
    free(1000)
    with pytest.raises(memory.NotEnoughMemory, match="tokenizer needs 0.00 GiB of host memory"):
        vlm_jax.load("vqgan", str(tmp_path / "tokenizer"))
    with pytest.raises(memory.NotEnoughMemory, match="checkpoint.safetensors needs"):
        vlm_jax.load("nxtp", str(golden_nxtp / "checkpoint.safetensors"), llama=str(tmp_path))


def test_only_one_tensor_is_read_before(free, golden_lvm):
    free(1000)
    with pytest.raises(memory.NotEnoughMemory, match="needs"):
        vlm_jax.load("vqgan", "tiny")
    sizes = json.loads((golden_lvm / "config.json").read_text())["llama"]
    task = lvm.make_task(dataclasses.asdict(llama.config_from_hf(sizes)), codebook_size=16)
    with pytest.raises(memory.NotEnoughMemory, match="llama.safetensors needs"):
        lvm.load_upstream(str(golden_lvm / "llama.safetensors"), task)


# ---- training ----------------------------------------------------------------------------------


def warnings(trainable=".*", **mesh):
    task = tiny_system.make_task(dict(width=8), noise=0.0)
    settings = optim.OptimConfig(trainable=trainable, ema=0.9)
    recipe = type("Recipe", (), dict(optim=settings, train=train.TrainConfig(1, 8)))()
    optimizer = optim.make_optimizer(settings, 1)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: update.init_state(task, optimizer, recipe, key))
    placed = train.state_shardings(sharding.make_mesh(sharding.MeshConfig(**mesh)), task, state)
    learned, _ = optim.split(state["params"], trainable)
    return memory.warnings_of_training(state, placed, learned), memory.num_bytes(state["params"])


def test_training_that_fits_says_nothing(free):
    free(GIB)
    assert warnings()[0] == []
    free(None)
    assert warnings()[0] == []


def test_training_that_fits_not(free):
    _, size = warnings(data=8)
    free(8 * 5 * size - 1)  # of eight devices: parameters, two moments, average, gradients
    (line,), _ = warnings(data=8)
    for text in (
        "the host needs 0.00 GiB for 8 device(s)",
        "parameters",
        "moments",
        "average",
        "gradients",
        "are free",
        "mesh.fsdp",
        "optim.moment_dtype=bfloat16",
        "model.dtype=bfloat16",
        "model.remat=full",
    ):
        assert text in line
    free(8 * 5 * size + 1000)
    assert warnings(data=8)[0] == []


def test_cutting_over_devices_and_freezing_help(free):
    _, size = warnings(data=8)
    free(3 * 5 * size)
    assert warnings(data=8)[0] and not warnings(data=1, fsdp=8)[0]
    free(8 * 4 * size)
    assert warnings(data=8)[0] and not warnings("^head", data=8)[0]
