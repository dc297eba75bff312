"""The commands of README and docs: each is parsed and checked; those for small input are run.

A command runs with the files that it names, made small by `folder`, and with `QUICK`, so that a
training run takes two updates. What needs released weights or hours is checked as far as flags,
recipe, keys and types go. The two commands of README's top run in test_recipes and test_wheel.
"""

import argparse
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tests.datasets import own_data
from vlm_jax import main as main_lib
from vlm_jax.program import run as run_lib

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["README.md", "docs/*.md", "launch/README.md", "vlm_jax/systems/*/README.md"]
OWN_DATA = "docs/own_data.md"
# Stand for what a reader has to fill in; they are no part of a command.
OMITTED = ("...", "ARGUMENTS")
QUICK = [
    "--config.train.steps=2", "--config.train.log_every=1", "--config.optim.warmup_steps=0",
    "--config.train.batch_size=4", "--config.train.tensorboard=False",
]  # fmt: skip
FEW = {  # of one recipe
    "nxtp_own": ["--config.evals.heldout.ks=(1,2)", "--config.task.k=2"],
    "lvm_own": [
        "--config.prepare.sentences=4", "--config.prepare.heldout_sentences=2",
        "--config.evals.colorization.max_batches=1",
    ],
    "vqgan_own": ["--config.evals.heldout.max_batches=1"],
}  # fmt: skip
# Runs that need no scores: those of others are looked at.
UNSCORED = ("--workdir=runs/nouns", "--workdir=runs/both", "--workdir=runs/mine")
# Released weights, as the pages call them.
NOT_HERE = ("LVM_ckpts", "vqvae_ckpts", "ckpt_epoch_03.pth")


def pages():
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern))


def blocks(path, language):
    """Fenced blocks of a language, and blocks indented by four spaces."""
    text = path.read_text()
    fenced = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    .*\n)+", outside, re.MULTILINE)
    return fenced + [re.sub("^    ", "", block, flags=re.MULTILINE) for block in indented]


def commands(path):
    """The arguments behind `python -m`, a list per command."""
    found = []
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if "──" in part:  # a drawing
                    continue
                words = shlex.split(part, comments=True)
                if words[:2] == ["python", "-m"] and words[2].startswith("vlm_jax."):
                    found.append([word for word in words[2:] if word not in OMITTED])
    return found


COMMANDS = [
    pytest.param(command, id=f"{path.relative_to(ROOT)}:{number}")
    for path in pages()
    for number, command in enumerate(commands(path))
]


def write_own_recipe(folder):
    """The file that the page on own data shows."""
    (text,) = [x for x in blocks(ROOT / OWN_DATA, "python") if x.startswith("# mine.py")]
    (folder / "mine.py").write_text(text)


class Parsed(Exception):
    """Raised in place of doing anything."""


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_recipe_keys_and_types(command, tmp_path, monkeypatch):
    module, *arguments = command
    write_own_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    if module == "vlm_jax.main":
        argv = main_lib._locate_recipe(["main", *arguments])
        values = main_lib._define_flags(argv)
        values(argv)
        if values["config"].value is not None:
            run_lib.read_recipe(values["config"].value, tmp_path)
        return
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self, *given):
        parse(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(arguments)


def test_there_are_commands_on_the_pages():
    counts = {str(path.relative_to(ROOT)): len(commands(path)) for path in pages()}
    assert counts["README.md"] >= 3 and counts[OWN_DATA] >= 10, counts


def test_every_link_leads_somewhere():
    missing = [
        f"{path.relative_to(ROOT)}: {link}"
        for path in pages()
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
        if "://" not in link and not (path.parent / link).exists()
    ]
    assert not missing


def test_the_networks_alone():
    """All blocks of the page, one after the other, as a reader types them; five lines at most."""
    found = blocks(ROOT / "docs" / "networks.md", "python")
    assert len(found) >= 6
    names = {}
    for block in found:
        assert len(block.splitlines()) <= 5, block
        exec(block, names)
    assert names["logits"].shape == (1, 8, 8292) and names["ids"].shape == (1, 256)
    assert names["cosines"].shape == (2, 3)


def test_generation():
    names = {}
    for block in blocks(ROOT / "docs" / "generation.md", "python"):
        exec(block, names)
    made = names["continue_"](names["fast"], np.arange(8)[None], names["jax"].random.key(1))
    assert made.tokens_bst.shape == (1, 2, 6)
    assert names["found"].ids_bwt.shape == (1, 3, 6)
    assert (
        names["made"].carry.shape == (1, 6, 128) and np.asarray(names["made"].carry).any(-1).all()
    )


@pytest.mark.slow
def test_the_api_reference(tmp_path):
    """Built without a warning, with the page on the networks in it."""
    pytest.importorskip("pdoc")
    out = subprocess.run(
        [sys.executable, ROOT / "docs" / "api.py", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert out.returncode == 0, out.stderr
    page = (tmp_path / "vlm_jax" / "models.html").read_text()
    assert "The networks alone" in page and "hidden_states" in page
    assert "Lvm" in (tmp_path / "vlm_jax" / "systems" / "lvm.html").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_data):
    """What the page on own data calls photos, captioned, clips, a.png, ..."""
    root = tmp_path_factory.mktemp("own")
    own_data.class_folders(root / "photos", count=6)
    own_data.captioned(root / "captioned", count=8)
    own_data.videos(root / "clips", count=4, frames=12)
    for name in ("a.png", "b.png", "cafe.jpg", "dog.jpg"):
        own_data.photo(root / name, len(name))
    write_own_recipe(root)
    return root


def quick(command):
    """A command with less to do."""
    module, *arguments = command
    if module != "vlm_jax.main" or "--describe" in arguments:
        return command
    recipe = next(a for a in arguments if a.startswith("--config="))
    name = pathlib.Path(recipe.partition("=")[2]).name.partition(".")[0]
    few = ["--config.evals={}"] if set(arguments) & set(UNSCORED) else FEW.get(name, [])
    return [module, *arguments, *QUICK, *few]


@pytest.mark.slow
def test_the_page_on_own_data(folder):
    """All its commands, one after the other, as a reader types them."""
    # One device, as a laptop has.
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("XLA_FLAGS", None)
    done = []
    for command in commands(ROOT / OWN_DATA):
        if any(name in word for word in command for name in NOT_HERE):
            continue
        out = subprocess.run(
            [sys.executable, "-m", *quick(command)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
            env=env,
        )
        assert out.returncode == 0, f"{shlex.join(command)}\n{out.stdout}\n{out.stderr[-3000:]}"
        done.append((command, out))
    assert len(done) >= 10
    scores = {
        path.parent.name: json.loads(path.read_text().splitlines()[-1])
        for path in folder.glob("runs/*/metrics.jsonl")
    }
    assert {"labels", "nouns", "clips", "tokens", "tokenizer", "both", "mine"} <= set(scores)
    for run in ("labels", "more", "packed"):
        assert {"eval/heldout/f1", "eval/heldout/nearest_f1"} <= set(scores[run]), run
        assert list(folder.glob(f"runs/{run}/eval/*/heldout/labels.png"))
    assert "eval/heldout/thumbnail_psnr" in scores["tokenizer"]
    assert list(folder.glob("runs/clips/eval/*/samples/samples.png"))
    assert np.any([path.name.endswith(".png") for path in (folder / "pictures").iterdir()])
    said = {shlex.join(command): out for command, out in done}
    (more,) = [out for words, out in said.items() if "runs/more" in words]
    assert "from init.run=runs/labels" in more.stderr
    (described,) = [out for words, out in said.items() if "--describe" in words]
    assert "--config.train.steps=300    int, required" in described.stdout
