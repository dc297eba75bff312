"""Memory of `predict` by the number of photos: it must not grow with them.

    python benchmarks/predict_memory.py --checkpoint=RUN                     # 60 and 6,000 photos
    python benchmarks/predict_memory.py --checkpoint=RUN --counts 60 1200 --megapixels 0.3

RUN is one of NXTP. The photos are one JPEG under many names (hard links), so the disk holds it once
and every name is decoded. Prints a row per number of photos: the largest resident memory of the
process, its seconds, and photos per second from start to end. Small photos show in little time what
grows with their number; large ones what is held at once.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import machine
import numpy as np
from PIL import Image

BATCH = 32  # photos per device call


def link_photos(folder, count, megapixels):
    """One JPEG of smooth noise, which is as large as a real one, under `count` names."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (375, 500, 3), np.uint8))
    first = folder / "photo_00000.jpg"
    scale = (megapixels * 1e6 / 12) ** 0.5
    sides = round(4 * scale), round(3 * scale)
    small.resize(sides, Image.Resampling.BICUBIC).save(first, quality=90)
    for number in range(1, count):
        os.link(first, folder / f"photo_{number:05}.jpg")


def measure(command):
    """(largest resident memory in MiB, seconds) of a program that ends well."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # of this process alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    kib = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kib / 1024, time.monotonic() - start


def predict(args, count):
    """(lines written, largest resident memory in MiB, seconds) of `count` photos."""
    with tempfile.TemporaryDirectory() as folder:
        photos, out = pathlib.Path(folder, "photos"), pathlib.Path(folder, "labels.jsonl")
        link_photos(photos, count, args.megapixels)
        program = [sys.executable, "-m", "vlm_jax.predict", "nxtp", f"--batch_size={BATCH}"]
        options = [f"--checkpoint={args.checkpoint}", f"--k={args.k}", f"--out={out}"]
        found = measure([*program, *options, "--image", str(photos)])
        with open(out) as lines:
            return sum(1 for _ in lines), *found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[60, 6000])
    parser.add_argument("--megapixels", type=float, default=12.0)
    parser.add_argument("--k", type=int, default=20)
    args = parser.parse_args()
    rows = []
    for count in args.counts:
        predict(args, BATCH + count % BATCH)  # compiles the shapes of this row, which takes memory
        done, peak_mib, seconds = predict(args, count)
        row = {"photos": count, "Mpx": args.megapixels, "done": done, "peak MiB": round(peak_mib)}
        rows.append(
            machine.note({**row, "s": round(seconds), "photos/s": f"{count / seconds:.2f}"})
        )
    machine.print_table(rows)
    print(machine.describe())


if __name__ == "__main__":
    main()
