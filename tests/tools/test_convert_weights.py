"""The conversion command: its report, and one clean line for every bad input."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from vlm_jax.models import clip as clip_model
from vlm_jax.models import vqgan as model
from vlm_jax.nn import functional
from vlm_jax.systems import nxtp as nxtp_system
from vlm_jax.systems.nxtp import vocabulary
from vlm_jax.systems.nxtp import weights as nxtp
from vlm_jax.tools import convert_weights
from vlm_jax.weights import clip, conversion, errors, export, llama, readers, vqgan


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
    assert (
        run(
            f"--from=params::{stream}",
            f"--to={tmp_path / 'out'}",
            "--system=lvm",
            "--format=hf",
            "--dtype=float32",
        )
        == 0
    )
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
    assert (
        run(
            f"--from={source / 'model.bin'}",
            f"--to={tmp_path / 'o'}",
            "--system=lvm",
            "--format=native",
        )
        == 0
    )
    assert f"ignored   {extra}\n" in capsys.readouterr().out


def test_vqgan(tmp_path, golden_lvm, capsys):
    fields = json.loads((golden_lvm / "config.json").read_text())["vqgan"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "t.safetensors").write_bytes((golden_lvm / "vqgan.safetensors").read_bytes())
    assert (
        run(f"--from={tmp_path}", f"--to={tmp_path / 'out'}", "--system=vqgan", "--format=native")
        == 0
    )
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
    assert (
        run(
            f"--from={flags['source']}",
            f"--to={tmp_path / 'out'}",
            "--format=hf",
            f"--system={flags['system']}",
            f"--preset={flags['preset']}",
        )
        == 1
    )
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
    assert conversion.common_dtype(names) == expected


# ---- runs and other networks -------------------------------------------------------------------


@pytest.mark.parametrize("system", ["lvm", "vqgan"])
@pytest.mark.parametrize("form", ["hf", "native"])
@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/7"])
def test_a_run_in_every_layout(make_run, tmp_path, capsys, system, form, part):
    workdir, task, params = make_run(system)
    assert (
        run(
            f"--from={workdir / part}",
            f"--to={tmp_path / 'out'}",
            f"--system={system}",
            f"--format={form}",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "parameters, step 7, float32: " in out
    assert f"source    {workdir / 'checkpoints' / '7'}" in out or part == "checkpoints/7"
    cfg, made = {"lvm": llama, "vqgan": vqgan}[system].load(tmp_path / "out")
    assert (cfg.num_embeddings if system == "vqgan" else cfg.vocab_size) > 30
    if system == "vqgan":
        params = model.tokenizer_part(params)
    jax.tree.map(np.testing.assert_array_equal, made, params)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_run_of_nxtp_in_the_names_of_the_reference(make_run, tmp_path, suffix):
    pytest.importorskip("torch")
    workdir, task, params = make_run("nxtp")
    file, half = tmp_path / f"out{suffix}", tmp_path / f"half{suffix}"
    flags = f"--from={workdir}", "--system=nxtp", "--format=upstream"
    assert run(*flags, f"--to={file}") == 0
    tensors = readers.read(file)
    table, head = (tensors[f"language_decoder.{x}.weight"] for x in ("tok_embeddings", "output"))
    np.testing.assert_array_equal(head[:-2], table[:-2])  # tied heads are written out
    made = nxtp.from_tensors(tensors, task.network.abstract())
    jax.tree.map(np.testing.assert_array_equal, made, params)
    assert run(*flags, f"--to={half}", "--released", "--dtype=float16") == 0
    released = readers.read(half)
    assert set(released) < set(tensors) and "vision_encoder.class_embedding" not in released
    assert released["language_decoder.norm.weight"].dtype == np.float16


def test_a_saved_model(tmp_path, golden_nxtp, capsys):
    words = vocabulary.load(str(golden_nxtp / "tokenizer.model"))
    decoder = dict(preset="tiny", vocab_size=words.size)
    task = nxtp_system.make_task(dict(vision=dict(preset="tiny"), decoder=decoder), delimiter_id=5)
    params = jax.tree.map(np.asarray, task.init(jax.random.key(0)))
    nxtp_system.Nxtp(task.cfg, params, words).save(tmp_path / "saved")
    flags = f"--from={tmp_path / 'saved'}", f"--to={tmp_path / 'out.safetensors'}"
    assert run(*flags, "--system=nxtp", "--format=upstream") == 0
    assert "a saved model" in capsys.readouterr().out
    made = nxtp.from_tensors(readers.read(tmp_path / "out.safetensors"), task.network.abstract())
    jax.tree.map(np.testing.assert_array_equal, made, params)
    assert run(*flags, "--system=lvm", "--format=hf") == 1
    assert "of the system 'nxtp', not 'lvm'" in capsys.readouterr().err


def test_released_nxtp_to_another_format(tmp_path, golden_nxtp):
    pytest.importorskip("torch")
    source, file = golden_nxtp / "checkpoint.safetensors", tmp_path / "out.pth"
    meta = json.loads((golden_nxtp / "meta.json").read_text())["config"]["decoder"]
    sizes = dict(
        dim=meta["dim"],
        n_layers=meta["blocks"],
        n_heads=meta["heads"],
        norm_eps=meta["norm_eps"],
        multiple_of=meta["ffn_hidden"],
    )
    (tmp_path / "params.json").write_text(json.dumps(sizes))
    assert (
        run(
            f"--from={source}",
            f"--to={file}",
            "--system=nxtp",
            "--format=upstream",
            f"--llama={tmp_path}",
        )
        == 0
    )
    before, after = readers.read(source), readers.read(file)
    assert set(before) == set(after)
    for name in set(before) - {"vision_encoder.logit_scale"}:  # read by nobody, and not kept
        np.testing.assert_allclose(after[name], before[name], rtol=1e-6)


@pytest.mark.parametrize(
    "form, target", [("hf", "out"), ("upstream", "out.pt"), ("upstream", "out.safetensors")]
)
def test_clip(tmp_path, form, target):
    pytest.importorskip("torch")
    cfg = clip_model.ClipConfig(
        clip_model.VisionConfig(128, 1, 8, 16, projection=24),
        clip_model.TextConfig(64, 2, 24, vocab_size=60, max_tokens=11),
    )
    shapes = functional.flatten(clip.abstract_params(cfg))
    rng = np.random.default_rng(0)
    params = functional.unflatten(
        {name: rng.normal(size=x.shape).astype(np.float32) for name, x in shapes.items()}
    )
    source = tmp_path / "clip.pt"
    export.write_file(source, clip.openai_checkpoint(params, "float32"))
    assert (
        run(f"--from={source}", f"--to={tmp_path / target}", "--system=clip", f"--format={form}")
        == 0
    )
    made_cfg, made = clip.load(tmp_path / target)
    assert {x.heads for x in (made_cfg.vision, made_cfg.text)} == {2, 1}
    jax.tree.map(np.testing.assert_array_equal, made, params)
    if form == "hf":
        transformers = pytest.importorskip("transformers")
        _, report = transformers.CLIPModel.from_pretrained(
            tmp_path / target, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.parametrize("system, form, target, message", [
    ("nxtp", "hf", "out", "--system=nxtp has no --format=hf; it has upstream"),
    ("lvm", "upstream", "out", "--system=lvm has no --format=upstream; it has hf or native"),
    ("nxtp", "upstream", "out.npz", "suffix '.npz' names no format"),
    ("nxtp", "upstream", "out", "suffix '' names no format"),
    ("lvm", "hf", "out", "is a run of the system 'nxtp', not 'lvm'"),
])  # fmt: skip
def test_layouts_that_a_system_has_not(make_run, tmp_path, capsys, system, form, target, message):
    workdir, *_ = make_run("nxtp")
    assert (
        run(
            f"--from={workdir}",
            f"--to={tmp_path / target}",
            f"--system={system}",
            f"--format={form}",
        )
        == 1
    )
    assert message in capsys.readouterr().err and not (tmp_path / target).exists()


def test_a_run_where_weights_are_wanted_names_the_command(make_run):
    workdir, *_ = make_run("lvm")
    for path in (workdir, workdir / "checkpoints" / "7"):
        with pytest.raises(errors.WeightsError, match="is a run of ours.*convert_weights --from="):
            llama.load(path)


@pytest.mark.slow
def test_command_line_without_traceback(tmp_path, source):
    (source / "model.safetensors").write_bytes(b"\xff" * 100)
    command = [
        sys.executable,
        "-m",
        "vlm_jax.tools.convert_weights",
        f"--from={source}",
        f"--to={tmp_path / 'out'}",
        "--system=lvm",
        "--format=hf",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("convert_weights: ") and "cut off or not safetensors" in line
