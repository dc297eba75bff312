"""Trains the small LVM of `configs/lvm_incontext.py` with its tokenizer, within a given time.

    python benchmarks/incontext.py --out=DIR --seconds=420            # a GPU
    python benchmarks/incontext.py --out=DIR --seconds=240 --small    # a CPU: shows that it runs

Tokenizer, token files, language model, evaluations, one after the other in one process. How many
updates fit is measured: each run stops after a few, which show the speed, and goes on from there
with the number that fills its share. What is in DIR at the end (eight files; the language model
from its first checkpoint on, so that a run that is cut off leaves something):

    tokenizer/, lvm/     params.safetensors (float16) and config.json, as `tools.export_run` writes
    report.json          scores, updates, seconds of every stage, versions, sha256
    metrics.jsonl        of both runs
    pictures.png         reconstructions, and the rows of the three tasks
    curves.png           of the language model
"""

import argparse
import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
import traceback

import numpy as np

START = time.monotonic()
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESERVE = 75.0  # seconds for evaluations, exports and pictures
sys.path.insert(0, str(ROOT))


def main():
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=420.0, help="in all, from the start on")
    parser.add_argument("--tokenizer_seconds", type=float, default=60.0, help="0: a shipped one")
    parser.add_argument("--tokenizer", default="tiny", help="which one is shipped: tiny or tiny32")
    parser.add_argument("--small", action="store_true", help="the tiny forms, for a CPU")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix="incontext-"))

    import jax

    from configs import lvm_incontext

    jax.config.update("jax_compilation_cache_dir", str(work / "xla"))
    report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    tokenizer = args.tokenizer
    if args.tokenizer_seconds:
        try:
            tokenizer = train_tokenizer(args, lvm_incontext, work, out, report)
        except Exception:  # the shipped one is worse, and better than nothing
            traceback.print_exc()
    train_lvm(args, lvm_incontext, tokenizer, work, out, report)
    finish(work, out, report)
    print(json.dumps(report, indent=1))


def train_tokenizer(args, recipes, work, out, report):
    """The folder of the new tokenizer."""
    config = recipes.tokenizer()
    if args.small:
        config.prepare.chunk, config.train.batch_size = 8, 16
        for kind in config.prepare.sentences:
            config.prepare.sentences[kind] = 24
    fit(config, work / "tokenizer", args.tokenizer_seconds, 2 if args.small else 150, report)
    export(work / "tokenizer", out / "tokenizer", report)
    return str(out.absolute() / "tokenizer")


def train_lvm(args, recipes, tokenizer, work, out, report):
    """Trains the language model for the rest of the time, exporting it as it goes."""
    config = recipes.tiny() if args.small else recipes.full()
    config.task.tokenizer = tokenizer
    done = threading.Event()
    exporter = threading.Thread(target=export_newest, args=(work / "lvm", out / "lvm", done))
    exporter.start()
    try:
        fit(config, work / "lvm", None, 5 if args.small else 100, report, until=args.seconds)
    finally:
        done.set()
        exporter.join()
        export(work / "lvm", out / "lvm", report)


def fit(config, workdir, seconds, probe, report, until=None):
    """Trains for `seconds`, or until so many have passed since the start; scores at the end."""
    from vlm_jax.program import run

    name, evals, began = workdir.name, config.evals.to_dict(), time.monotonic()
    config.evals, config.train.save_every = {}, 0
    config.optim.decay_steps = config.train.steps  # as if they were as many as in the recipe
    config.train.steps, config.train.log_every = probe, max(1, probe // 3)
    run.run(config, workdir)
    speed = last(workdir, "speed/steps_per_s")
    if until is not None:
        seconds = until - RESERVE - (time.monotonic() - START)
    steps = probe + max(probe, int(0.95 * speed * seconds))
    say(f"{name}: {speed:.1f} updates a second; {steps} in all")
    config.train.steps, config.train.log_every = steps, max(1, steps // 60)
    config.train.save_every, config.optim.decay_steps = max(probe, int(45 * speed)), 0
    config.optim.warmup_steps = min(config.optim.warmup_steps, steps // 4)
    config.evals = evals
    scores = run.run(config, workdir)
    report[name] = {
        "updates": steps,
        "batch": config.train.batch_size,
        "updates_per_s": speed,
        "seconds": round(time.monotonic() - began),
        "scores": {key: value for key, value in sorted(scores.items()) if key.startswith("eval")},
    }
    say(f"{name}: {report[name]['seconds']} s")


def export_newest(workdir, to, done):
    """Exports every checkpoint that appears, until `done`."""
    seen = None
    while not done.wait(5):
        newest = max((path.name for path in workdir.glob("checkpoints/[0-9]*")), default=None)
        if newest == seen:
            continue
        try:
            export(workdir, to, {})
            seen = newest
        except Exception as error:  # not complete yet: again in a moment
            say(f"no export of {newest} yet: {error}")


def export(workdir, to, report):
    """Writes the weights as float16, in place of older ones."""
    from vlm_jax.tools import export_run

    fresh = pathlib.Path(tempfile.mkdtemp(dir=workdir.parent))
    digests = export_run.export(str(workdir), str(fresh), dtype="float16")
    to.mkdir(exist_ok=True)
    if to.name == "lvm":  # not the folder of this machine, but what the package will call it
        config = json.loads((fresh / "config.json").read_text())
        for section in ("task", "prepare"):
            if config.get(section, {}).get("tokenizer", "tiny") != "tiny":
                config[section]["tokenizer"] = "tiny32"
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in fresh.iterdir():
        partial = to / f".{file.name}"
        shutil.copyfile(file, partial)
        os.replace(partial, to / file.name)
    report[f"{to.name}_sha256"] = digests


def finish(work, out, report):
    """Pictures, metrics and the report."""
    from vlm_jax.data import images

    sheets = sorted(work.glob("*/eval/*/*/*.png"))
    if sheets:
        sheets = [images.decode(sheet) for sheet in sheets]
        width = max(sheet.shape[1] for sheet in sheets)
        padded = [
            np.pad(x, ((0, 12), (0, width - x.shape[1]), (0, 0)), constant_values=255)
            for x in sheets
        ]
        (out / "pictures.png").write_bytes(images.encode(np.concatenate(padded)))
    with (out / "metrics.jsonl").open("w") as file:
        for path in sorted(work.glob("*/metrics.jsonl")):
            for line in path.read_text().splitlines():
                file.write(json.dumps({"run": path.parent.name, **json.loads(line)}) + "\n")
    if (work / "lvm" / "curves.png").exists():
        shutil.copyfile(work / "lvm" / "curves.png", out / "curves.png")
    report["seconds"] = round(time.monotonic() - START)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def last(workdir, key):
    """The newest value of a metric."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line[key] for line in map(json.loads, lines) if key in line][-1]


def say(text):
    """With the seconds since the start."""
    print(f"[{time.monotonic() - START:5.0f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
