"""The conversion command: its report, and one clean line for every bad input."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from vlm_jax.tools import convert_weights
from vlm_jax.weights import llama, readers


@pytest.fixture
def source(tmp_path, golden_lvm):
    """A released-like folder: config.json and model.safetensors."""
    folder = tmp_path / "source"
    folder.mkdir()
    fields = json.loads((golden_lvm / "config.json").read_text())["llama"]
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").write_bytes((golden_lvm / "llama.safetensors").read_bytes())
    return folder


def run(*flags):
    return convert_weights.main([str(flag) for flag in flags])


def test_report_of_hf_to_native_and_back(tmp_path, source, capsys):
    native, back = tmp_path / "native", tmp_path / "back"
    assert run(f"--from={source}", f"--to={native}", "--system=lvm", "--format=native") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"read      21 tensors, hf layout, float32: {source}"
    assert lines[1] == "ignored   none"
    # 2 * 100 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert lines[2] == f"wrote     12 tensors, 95,040 parameters, float32, native layout: {native}"
    assert lines[3].startswith("sha256    ") and lines[3].endswith("  params.safetensors")
    assert run(f"--from={native}", f"--to={back}", "--system=lvm", "--format=hf") == 0
    first, second = readers.read(source), readers.read(back)
    assert sorted(first) == sorted(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_easylm_stream_to_hf(tmp_path, golden_lvm, source, capsys):
    stream = source / "streaming_params"
    stream.write_bytes((golden_lvm / "streaming_params_bf16.msgpack").read_bytes())
    assert run(f"--from=params::{stream}", f"--to={tmp_path / 'out'}", "--system=lvm",
               "--format=hf", "--dtype=float32") == 0  # fmt: skip
    assert "easylm layout, bfloat16" in capsys.readouterr().out
    cfg, _ = llama.load(tmp_path / "out")
    assert cfg.vocab_size == 100
    back, hf = readers.read(tmp_path / "out"), readers.read(source)
    for name in hf:
        np.testing.assert_allclose(back[name], hf[name], rtol=2**-8)  # bf16 keeps 8 bits


def test_ignored_tensors_are_reported(tmp_path, source, capsys):
    torch = pytest.importorskip("torch")
    tensors = readers.read(source)
    state = {name: torch.tensor(tensors[name]) for name in tensors}
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    torch.save(state | {extra: torch.zeros(8)}, source / "model.bin")
    assert run(f"--from={source / 'model.bin'}", f"--to={tmp_path / 'o'}", "--system=lvm",
               "--format=native") == 0  # fmt: skip
    assert f"ignored   {extra}\n" in capsys.readouterr().out


def test_vqgan(tmp_path, golden_lvm, capsys):
    fields = json.loads((golden_lvm / "config.json").read_text())["vqgan"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "t.safetensors").write_bytes((golden_lvm / "vqgan.safetensors").read_bytes())
    assert run(f"--from={tmp_path}", f"--to={tmp_path / 'out'}", "--system=vqgan",
               "--format=native") == 0  # fmt: skip
    assert "read      181 tensors, hf layout" in capsys.readouterr().out
    assert "quantize/embedding" in readers.read(tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(source="nowhere"), "no such checkpoint"),
        (dict(preset="lvm_9b"), "no preset 'lvm_9b'; there are lvm_debug"),
        (dict(preset="lvm_debug"), "tensors do not fit"),
        (dict(system="vqgan"), "not a VQGAN checkpoint"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(tmp_path, source, capsys, change, message):
    flags = dict(source=source, system="lvm", preset="") | change
    assert run(f"--from={flags['source']}", f"--to={tmp_path / 'out'}", "--format=hf",
               f"--system={flags['system']}", f"--preset={flags['preset']}") == 1  # fmt: skip
    captured = capsys.readouterr()
    assert captured.err.startswith("convert_weights: ") and message in captured.err
    assert captured.out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config, message",
    [
        ("{", "config.json: Expecting property name"),
        ("[1]", "config.json: "),
        ('{"hidden_size": 64}', "config.json: ['vocab_size'"),
        ('{"system": "lvm", "model": {"wide": 1}}', "config.json: "),
    ],
)
def test_bad_config_is_named(tmp_path, source, capsys, config, message):
    (source / "config.json").write_text(config)
    assert run(f"--from={source}", f"--to={tmp_path / 'out'}", "--format=hf", "--system=lvm") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("names, expected", [
    (["float32"], "float32"), (["float16"], "float16"), (["bfloat16"], "bfloat16"),
    (["bfloat16", "float16"], "float32"), (["bfloat16", "float8_e4m3fn"], "bfloat16"),
    (["float16", "float8_e5m2"], "float16"), (["float8_e4m3fn", "float8_e5m2"], "bfloat16"),
    (["float64", "bfloat16"], "float32"),
])  # fmt: skip
def test_the_dtype_that_holds_a_mixture(names, expected):
    assert convert_weights.common_dtype(names) == expected


@pytest.mark.slow
def test_command_line_without_traceback(tmp_path, source):
    (source / "model.safetensors").write_bytes(b"\xff" * 100)
    command = [sys.executable, "-m", "vlm_jax.tools.convert_weights", f"--from={source}",
               f"--to={tmp_path / 'out'}", "--system=lvm", "--format=hf"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("convert_weights: ") and "cut off or not safetensors" in line
