"""What the benchmarks share: taking turns, tables, the machine in words, and its ceilings."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp


@dataclasses.dataclass
class Times:
    """Minimum over the rounds; CPU seconds are those of all threads of this process."""

    wall_s: float = float("inf")
    cpu_s: float = float("inf")


def take_turns(runs, rounds):
    """Runs every function once per round, in turns, so that a busy spell hits all alike.

    Args:
      runs: name -> function; its result is waited for. Warm it up (compile) before.
      rounds: number of turns.

    Returns:
      name -> Times.
    """
    times = {name: Times() for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            best = times[name]
            best.wall_s = min(best.wall_s, time.perf_counter() - wall)
            best.cpu_s = min(best.cpu_s, time.process_time() - cpu)
    return times


def read_bandwidth():
    """Bytes per second when reading an array once: the best of a sum and of products with a vector.

    The array is float32 and far larger than any cache; on accelerators large enough to hide what a
    call costs.
    """
    gib = 1 if jax.default_backend() == "cpu" else 8
    x = jnp.ones((gib * 2**16, 4096), jnp.float32)
    v = jnp.ones(4096, jnp.float32)
    add, multiply = jax.jit(jnp.sum), jax.jit(jnp.dot)
    runs = {"sum": lambda: add(x), "product": lambda: multiply(x, v)}
    if jax.default_backend() == "cpu":
        import torch

        t = torch.ones(x.shape)
        runs["torch sum"] = lambda: t.sum().item()
    for run in runs.values():
        jax.block_until_ready(run())
    return x.nbytes / min(t.wall_s for t in take_turns(runs, 5).values())


def product_rate(side=8192):
    """FLOP/s of a bfloat16 product of two square matrices of random numbers."""
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in (0, 1))
    multiply = jax.jit(jnp.dot)
    # One call is shorter than the time it takes to see its end.

    def run():
        return [multiply(a, b) for _ in range(10)]

    jax.block_until_ready(run())
    return 10 * 2 * side**3 / take_turns({"": run}, 5)[""].wall_s


def has_cuda_torch():
    """Whether torch is installed and sees the GPU that jax runs on."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def on_torch(run):
    """`run`, waiting until the GPU is done: torch's calls return before, and jax cannot see it."""

    def wait(*args):
        import torch

        result = run(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return wait


def note(row):
    """Prints a row as soon as it is known, so that a program cut short has shown it; returns it."""
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def print_table(rows):
    """A Markdown table of dicts; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    width = {c: max(len(c), *(len(str(row.get(c, ""))) for row in rows)) for c in columns}

    def line(cells):
        return "| " + " | ".join(s.ljust(width[c]) for c, s in cells) + " |"

    print(line([(c, c) for c in columns]))
    print(line([(c, "-" * width[c]) for c in columns]))
    for row in rows:
        print(line([(c, str(row.get(c, ""))) for c in columns]))


def describe():
    """Processor, usable cores, load, device and versions in one line."""
    names = ("jax", "flax", "torch", "transformers")
    found = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    versions = [f"{n} {importlib.metadata.version(n)}" for n in names if n in found]
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{model[0] if model else platform.processor()}, {cores} cores usable, load "
        f"{os.getloadavg()[0]:.1f}; {jax.device_count()} x {jax.devices()[0].device_kind}; "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )
