"""Every recipe: its full form by shapes and shardings, its tiny form by running it."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from vlm_jax import main as main_lib
from vlm_jax import task as task_lib
from vlm_jax.models import llama
from vlm_jax.program import config as config_lib
from vlm_jax.program import optim, run, sharding

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.endswith("_own"))
OWN = sorted(path.stem for path in CONFIGS.glob("*_own.py"))
PARAMETERS = {  # counted from the upstream configurations
    "lvm_300m": 290_968_576,
    "lvm_600m": 648_396_288,
    "lvm_1b": 1_147_119_616,
    "lvm_3b": 3_274_742_400,
    "lvm_7b": 6_544_199_680,
    "lvm_incontext": 5_100_800,
    "vqgan_f16": 146_244_675,
    # Without CLIP's temperature, which NXTP carries along unused.
    # Without SAM and what prompts it, and with them.
    "nextchat_stage1": 7_079_745_540,
    "nextchat_stage2": 7_079_745_540,
    "nextchat_stage3": 7_741_812_788,
    "nxtp_g3m": 1_783_838_720,
    "nxtp_g70m": 1_783_838_720,
    "nxtp_in1k": 1_783_838_720,
}


def read(name, tmp_path, *overrides):
    argv = ["main", f"--config={CONFIGS / name}", "--workdir=w", *overrides]
    values = main_lib._define_flags(main_lib._locate_recipe(argv))
    values(argv)
    return run.read_recipe(values["config"].value, tmp_path)


# Steps, warm-up, updates until the end of the decay, peak learning rate, rows, parts of a batch.
LVM = (200_000, 8_000, 200_000, 1.5e-4, 512, 1)
LVM_7B = (100_000, 8_000, 288_000, 1.5e-4, 128, 4)  # the published command
LVM_TINY, LVM_SMALL = (600, 20, 600, 5e-3, 8, 1), (600, 50, 600, 4e-3, 8, 1)
NXTP_TINY = (160, 10, 160, 1e-3, 16, 1)
SCHEDULES = {
    (f"lvm_{size}", form): numbers
    for size in ("300m", "600m", "1b", "3b", "7b")
    for form, numbers in {
        "": LVM_7B if size == "7b" else LVM,
        ":reference": LVM_7B if size == "7b" else LVM,
        ":small": LVM_SMALL,
        ":tiny": LVM_TINY,
    }.items()
} | {
    ("lvm_incontext", ""): (3_000, 150, 3_000, 2e-3, 256, 1),
    ("lvm_incontext", ":anneal"): (80, 5, 80, 5e-4, 16, 1),
    ("lvm_incontext", ":tokenizer"): (6_000, 100, 6_000, 2e-3, 128, 1),
    ("lvm_incontext", ":tiny"): (60, 10, 60, 4e-3, 8, 1),
    ("nextchat_stage1", ""): (65_000, 1_950, 65_000, 2e-5, 64, 1),
    ("nextchat_stage2", ""): (4_950, 148, 4_950, 2e-5, 64, 1),
    ("nextchat_stage3", ""): (5_950, 178, 5_950, 2e-5, 64, 1),
    ("nxtp_g3m", ""): (21_360, 2_000, 21_360, 1e-5, 512, 1),
    ("nxtp_g3m", ":tiny"): NXTP_TINY,
    ("nxtp_g70m", ""): (414_138, 2_000, 414_138, 1e-5, 512, 1),
    ("nxtp_g70m", ":tiny"): NXTP_TINY,
    ("nxtp_in1k", ""): (50_045, 2_000, 50_045, 1e-5, 128, 1),
    ("nxtp_in1k", ":tiny"): NXTP_TINY,
    ("lvm_own", ""): LVM_TINY,
    ("lvm_own", ":released"): (500, 20, 500, 1e-5, 8, 1),
    ("nxtp_own", ""): NXTP_TINY,
    ("nxtp_own", ":released"): (1_000, 100, 1_000, 1e-5, 32, 1),
    ("vqgan_own", ""): (400, 20, 400, 5e-4, 8, 1),
    ("vqgan_own", ":released"): (5_000, 100, 5_000, 5e-5, 16, 1),
    ("vqgan_f16", ""): (1_000_000, 5_000, 1_000_000, 1e-4, 256, 1),
    ("vqgan_f16", ":decoder"): (200_000, 1_000, 200_000, 5e-5, 256, 1),
    ("vqgan_f16", ":tiny"): (1_500, 30, 1_500, 3e-3, 8, 1),
    ("vqgan_f16", ":tiny_decoder"): (300, 20, 300, 1e-3, 8, 1),
}
FORMS = sorted(SCHEDULES)


@pytest.mark.parametrize("name, form", FORMS)
def test_sections_shapes_and_shardings(name, form, tmp_path):
    own = ["--config.path=/somewhere"] if name in OWN else []
    recipe = read(f"{name}.py{form}", tmp_path, *own)
    system = task_lib.resolve(recipe.system, "systems")
    task = system.make_task(dict(recipe.model), **recipe.task)
    system.make_formatter(**recipe.formatter)
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    if not form and name not in OWN:
        total = sum(x.size for x in jax.tree.leaves(abstract))
        # A system may train more than the released network, for example a discriminator.
        assert total >= PARAMETERS[name]
        if recipe.system == "lvm":
            assert total == PARAMETERS[name]
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = sharding.of_params(mesh, task.sharding_rules, abstract)
    assert jax.tree.structure(placed) == jax.tree.structure(abstract)


@pytest.mark.parametrize("name", OWN)
def test_one_path_reaches_every_section(name, tmp_path):
    recipe = read(f"{name}.py", tmp_path, "--config.path=/somewhere")
    sections = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    text = repr(sections)
    # The field itself, training data, held-out data.
    assert text.count("'/somewhere'") >= 3 and "'path': ''" not in text
    with pytest.raises(config_lib.ConfigError, match="path is empty.*--config.path=FOLDER"):
        read(f"{name}.py", tmp_path)


@pytest.mark.parametrize("name, form", FORMS)
def test_the_schedule_that_is_run(name, form, tmp_path):
    own = ["--config.path=/somewhere"] if name in OWN else []
    recipe = read(f"{name}.py{form}", tmp_path, *own)
    steps, warmup, decay, lr, rows, parts = SCHEDULES[name, form]
    settings = recipe.train, recipe.optim
    assert (settings[0].steps, settings[0].batch_size) == (steps, rows)
    assert (settings[0].accumulate, settings[1].warmup_steps) == (parts, warmup)
    schedule = optim.make_schedule(recipe.optim, steps)
    assert float(schedule(0)) == 0.0
    assert float(schedule(warmup)) == pytest.approx(lr)
    halfway = (lr + recipe.optim.end_lr) / 2  # of a cosine, and not at another place
    assert float(schedule(warmup + (decay - warmup) // 2)) == pytest.approx(halfway, rel=0.02)
    assert float(schedule(decay)) == pytest.approx(recipe.optim.end_lr, rel=1e-5, abs=1e-12)


def test_every_recipe_is_listed():
    assert {name for name, _ in FORMS} == {*RECIPES, *OWN}


@pytest.mark.parametrize("name", [*RECIPES, *OWN])
def test_a_recipe_refuses_another_argument(name, tmp_path):
    with pytest.raises((ValueError, flags.Error), match="argument 'tinyy' is n"):
        read(f"{name}.py:tinyy", tmp_path)


# Compiles the update of every preset on 8 devices, without allocating anything. In a process of
# its own, because the partitioner complains on the file descriptor of stderr.
COMPILE = """
import dataclasses, sys
import jax, jax.numpy as jnp
from vlm_jax.program import optim, run, sharding, train
from vlm_jax.models import llama
from vlm_jax.ops import partition
from vlm_jax.systems import lvm

preset, sizes = sys.argv[1], sys.argv[2].split("x")
cfg = dataclasses.replace(llama.PRESETS[preset], dtype="bfloat16", remat="full")
task = lvm.LvmTask(cfg)
mesh = sharding.make_mesh(sharding.MeshConfig(*map(int, sizes)))
recipe = run.Recipe(system="lvm", model={}, data=None,
                    train=train.TrainConfig(steps=10, batch_size=8))
optimizer = optim.make_optimizer(recipe.optim, 10)
state = jax.eval_shape(lambda: train.init_state(task, optimizer, recipe, jax.random.key(0)))
shardings = train.state_shardings(mesh, task, state)
ints = jax.ShapeDtypeStruct((8, 256), jnp.int32)
batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), ints)
batch["weights"] = jax.ShapeDtypeStruct((8, 256), jnp.float32)
everywhere = sharding.replicated(mesh)
step = jax.jit(train.make_train_step(task, optimizer, recipe),
               in_shardings=(shardings, sharding.of_batch(mesh), everywhere),
               out_shardings=(shardings, everywhere), donate_argnums=0)
with partition.use_mesh(mesh):
    step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(set(llama.PRESETS) & set(PARAMETERS)))
def test_no_involuntary_rematerialization(preset):
    # Neither silenced nor read from the cache; tests/models/test_llama.py shows that a bad rule
    # is then heard.
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    env["TF_CPP_MIN_LOG_LEVEL"] = "0"
    out = subprocess.run(
        [sys.executable, "-c", COMPILE, preset, "2x2x2"],
        capture_output=True,
        text=True,
        timeout=900,
        env=env,
    )
    assert "compiled" in out.stdout, out.stderr[-3000:]
    assert not re.search("involuntary full remat", out.stderr, re.IGNORECASE), out.stderr


def command(*arguments, timeout=900):
    return subprocess.run(
        [sys.executable, "-m", "vlm_jax.main", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=CONFIGS.parent,
    )


def lines_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        (line["step"], key): value
        for line in lines
        for key, value in line.items()
        if not key.startswith("speed/") and key != "step"
    }


TINY = {
    "lvm_3b": [
        "--config.prepare.sentences=8",
        "--config.prepare.heldout_sentences=4",
        "--config.prepare.crops=20",
        "--config.optim.warmup_steps=2",
    ],
    "lvm_incontext": [f"--config.prepare.sentences.{kind}=8" for kind in ("mask", "colour")],
    "vqgan_f16": [],
    "vqgan_f16.py:tiny_decoder": [
        "--config.task.gan_start=2",
        "--config.evals.heldout.max_batches=1",
    ],
    "nxtp_g3m": ["--config.train.batch_size=8", "--config.evals.heldout.max_batches=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_tiny_trains_stops_resumes_and_evaluates(name, tmp_path, demo_data):
    """On real input. The continued run must give the bits of the uninterrupted one."""
    common = [
        f"--config=configs/{name if ':' in name else f'{name}.py:tiny'}",
        "--config.train.steps=6",
        "--config.train.log_every=1",
        "--config.train.save_every=3",
        "--config.optim.warmup_steps=0",
        *TINY[name],
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = command(*common, f"--workdir={whole}")
    assert out.returncode == 0, out.stderr[-3000:]
    # Without its last checkpoint a run is as if it had been killed after step 3.
    shutil.copytree(whole, parts)
    (parts / "checkpoints" / "6" / "COMMIT.json").unlink()
    out = command(*common, f"--workdir={parts}")
    assert out.returncode == 0, out.stderr[-3000:]
    assert "resuming from step 3 of 6" in out.stderr
    assert lines_of(whole) == lines_of(parts)
    pictures = [whole / "curves.png", *whole.glob("eval/00000006/*/*.png")]
    assert len(pictures) > 1
    for picture in pictures:
        assert_shows_something(picture)
    out = command(*common, f"--workdir={whole}", "--mode=evaluate")
    assert out.returncode == 0, out.stderr[-3000:]
    scored = json.loads((whole / "evaluation.jsonl").read_text().splitlines()[-1])
    trained = lines_of(whole)
    for key, value in scored.items():
        if key != "step":
            assert trained[6, key] == pytest.approx(value, rel=1e-6)
    if name == "lvm_3b":
        made = predicts(tmp_path, "lvm", whole, "--continue", PICTURE, PICTURE, "--candidates=2")
        assert made == ["candidate_0_frame_0.png", "candidate_1_frame_0.png", "grid.png"]
        assert Image.open(tmp_path / "out" / "candidate_0_frame_0.png").size == (32, 32)
        assert_shows_something(tmp_path / "out" / "grid.png")
    if name == "nxtp_g3m":
        made = predicts(tmp_path, "nxtp", whole, "--image", PICTURE, "--k=3", "--attention")
        layers = [f"picture_attention_layer_{layer}.png" for layer in range(3)]
        assert made == ["labels.json", "labels.png", *layers]
        for picture in made[1:]:
            assert_shows_something(tmp_path / "out" / picture)


PICTURE = "picture.png"


def assert_shows_something(path):
    """A picture of some size that is not of one colour."""
    pixels = np.array(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) >= 32, (path, pixels.shape)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 8, path


def predicts(tmp_path, system, workdir, *arguments):
    """The other command line, on the run just made; names of the files that it writes."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / PICTURE)
    arguments = [system, f"--checkpoint={workdir}", *arguments]
    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "vlm_jax.predict",
            *map(str, arguments),
            f"--out={tmp_path / 'out'}",
        ],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return sorted(path.name for path in (tmp_path / "out").iterdir())
