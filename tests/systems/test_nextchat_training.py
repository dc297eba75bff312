"""From people's own file to a run, and from the run to answers."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import vlm_jax
from tests.systems import nextchat_golden as golden
from vlm_jax.data import images

pytest.importorskip("sentencepiece")
RECIPE = """
import ml_collections


def get_config(arg=""):
    c = ml_collections.ConfigDict()
    c.system = "nextchat"
    c.model = dict(vision=dict(preset="tiny"), decoder=dict(preset="tiny"), sam=dict(preset="tiny"))
    c.task = dict(masks_per_device=2)
    c.formatter = dict(
        tokenizer="{tokenizer}", image_size=56, sam_size=128, max_tokens=256, locations=4, masks=2
    )
    c.data = dict(mixture=dict(mine=dict(type="conversations", path="{data}")), num_threads=0)
    c.optim = dict(lr=1e-3, schedule="constant", clip_norm=1.0, trainable="^(?!vision|sam/image)")
    c.train = dict(steps=3, batch_size=4, accumulate=2, log_every=1, tensorboard=False)
    return c
"""


@pytest.mark.slow
def test_train_and_chat(tmp_path, capsys):
    rng, lines = np.random.default_rng(0), []
    for number in range(6):
        image = rng.integers(0, 256, (40 + number, 50, 3), np.uint8)
        (tmp_path / f"{number}.png").write_bytes(images.encode(image))
        box = [5, 5, 20 + number, 25]
        said = {"role": "assistant", "content": "Answer: [0] .", "boxes": [box]}
        if number % 2:  # rows with and without masks, and with none of either
            said["masks"] = [[[5, 5, 20, 5, 20, 25]]]
        if number == 4:
            said = {"role": "assistant", "content": "There is nothing ."}
        lines.append({
            "image": f"{number}.png",
            "messages": [{"role": "user", "content": "Where is the dog?"}, said],
        })  # fmt: skip
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = tmp_path / "mine.py"
    tokenizer = golden.FOLDER / "tokenizer.model"
    recipe.write_text(RECIPE.replace("{tokenizer}", str(tokenizer)).replace("{data}", str(data)))
    workdir = tmp_path / "run"
    # On one device: eight simulated ones on two cores wait for each other until XLA gives up.
    command = [sys.executable, "-m", "vlm_jax.main", f"--config={recipe}", f"--workdir={workdir}"]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for term in ("text", "box_l1", "box_giou", "cycle_box", "mask_dice"):
        assert all(np.isfinite(line[f"train/loss/{term}"]) for line in steps)
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]

    model = vlm_jax.load("nextchat", str(workdir))
    said = model.chat(str(tmp_path / "0.png"), "Where is the dog?", max_tokens=8)
    assert said.text and len(said.masks) == len(said.boxes_xyxy_px)
    model.save(tmp_path / "saved")
    again = vlm_jax.load("nextchat", str(tmp_path / "saved"))
    assert again.chat(str(tmp_path / "0.png"), "Where is the dog?", max_tokens=8) == said
