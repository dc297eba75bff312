"""Runs every benchmark that suits this machine, one after another, each within a limit of time.

    python benchmarks/run_all.py --out results                # all
    python benchmarks/run_all.py --out results --minutes 4    # the first ones, as time allows
    python benchmarks/run_all.py --out results --quick        # tiny sizes, to see that they run

A program that fails or takes too long is reported, and the next one starts. What they print goes to
benchmarks.log in the folder --out, their tables to benchmarks.md. The exit status is 1 unless all
of them ran through.
"""

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Program:
    """A script of this folder with its arguments, and the seconds that it may take."""

    name: str
    command: str
    limit_s: float = 1800


@dataclasses.dataclass
class Outcome:
    """How a program ended: "ok", "failed (status)", "stopped after 60 s", "no time left"."""

    program: Program
    status: str
    seconds: float = 0.0
    lines: list[str] = dataclasses.field(default_factory=list)


# The most telling first: with little time the last ones are left out.
GPU = (
    Program("train 300M", "llama_train_step.py --batch 4 --tokens 2048 --remat none", 75),
    Program("decode 300M", "llama_decode.py", 75),
    Program("VQGAN", "vqgan.py --batches 64 16", 75),
    Program("one-shot labels", "one_shot.py --k 10", 75),
    Program("train 1B", "llama_train_step.py --preset lvm_1b --attention cudnn xla --alone", 75),
    Program("decode 3B", "llama_decode.py --preset lvm_3b --batches 1 32 --alone", 75),
    Program("attention", "attention.py --rounds 10", 60),
    Program("SAM ViT-H", "sam.py --preset vit_h --batches 1 8 --skip_torch", 75),
    Program("input pipeline", "input_pipeline.py --seconds 1", 75),
)
CPU = (
    Program("decode 300M", "llama_decode.py"),
    Program("train 300M", "llama_train_step.py --skip_update --rounds 2"),
    Program("VQGAN", "vqgan.py"),
    Program("one-shot labels", "one_shot.py --k 1 10 --skip jax"),
    Program("attention", "attention.py"),
    Program("chat with a box", "nextchat_chat.py"),
    Program("SAM ViT-B", "sam.py"),
    Program("input pipeline", "input_pipeline.py"),
)
QUICK = (
    Program("decode", "llama_decode.py --preset lvm_debug --new 64 --rounds 1", 300),
    Program("train", "llama_train_step.py --preset lvm_debug --tokens 64 --rounds 1", 300),
    Program("VQGAN", "vqgan.py --preset tiny --rounds 1", 300),
    Program("one-shot labels", "one_shot.py --tiny --k 1 --batch 1", 300),
    Program("attention", "attention.py --small --rounds 1", 300),
    Program("chat with a box", "nextchat_chat.py --tiny --new 16 --rounds 1", 300),
    Program("SAM", "sam.py --preset tiny --rounds 1", 300),
    Program("input pipeline", "input_pipeline.py --ids 64 --batch 8 --rows 64 --seconds 0.2", 300),
)


def run(program, log, left_s=float("inf")):
    """Runs one program, copying what it prints to the screen and to `log`.

    Args:
      program: a Program.
      log: text file.
      left_s: seconds that all programs together still have.

    Returns:
      Outcome.
    """
    if left_s < min(20, program.limit_s):  # too little to start
        return Outcome(program, "no time left")
    # jax and torch share a GPU, so neither may take all of its memory at the start.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1", **os.environ}
    script, *arguments = program.command.split()
    print(f"\n=== {program.name}: {program.command}", file=log, flush=True)
    start, lines = time.monotonic(), []
    process = subprocess.Popen(
        [sys.executable, str(HERE / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    limit_s = min(program.limit_s, left_s)
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    for line in process.stdout:
        lines.append(line.rstrip())
        print(f"[{time.monotonic() - start:5.1f} s] {lines[-1]}", file=log, flush=True)
        print(f"{program.name}: {lines[-1]}", flush=True)
    code = process.wait()
    timer.cancel()
    seconds = time.monotonic() - start
    status = "ok" if code == 0 else f"failed ({code})"
    if code < 0 and seconds >= limit_s:
        status = f"stopped after {limit_s:.0f} s"
    return Outcome(program, status, seconds, lines)


def report(outcomes):
    """The outcomes as Markdown: every table, or all lines of a program that did not get there."""
    parts = ["# Benchmarks\n", "| program | status | s |", "|---|---|---|"]
    parts += [f"| {o.program.name} | {o.status} | {o.seconds:.0f} |" for o in outcomes]
    for outcome in outcomes:
        parts += [f"\n## {outcome.program.name}\n", f"`{outcome.program.command}`\n"]
        table = [line for line in outcome.lines if line.startswith("|")]
        shown = table if outcome.status == "ok" else outcome.lines[-40:]
        parts += shown if shown is table else ["```", *shown, "```"]
        if outcome.status == "ok":
            parts += ["", outcome.lines[-1]]  # the machine
    return "\n".join(parts) + "\n"


def platform():
    """jax's platform, found in a process of its own: this one must not hold the GPU."""
    ask = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise SystemExit("jax does not start here; see above")
    return found.stdout.split()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for all together")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="names of programs")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    programs = QUICK if args.quick else (CPU if platform() == "cpu" else GPU)
    known = [program.name for program in programs]
    unknown = sorted(set(args.only) - set(known))
    if unknown:
        parser.error(f"--only {unknown}: the programs here are {known}")
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with open(args.out / "benchmarks.log", "w") as log:
        for program in programs:
            if args.only and program.name not in args.only:
                continue
            outcomes.append(run(program, log, end - time.monotonic()))
            (args.out / "benchmarks.md").write_text(report(outcomes))
    print("\n" + report(outcomes))
    sys.exit(any(outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    main()
