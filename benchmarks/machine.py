"""What the benchmarks share: taking turns, tables, the machine in words, its memory bandwidth."""

import dataclasses
import importlib.metadata
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


def read_bandwidth(gib=1.0):
    """Bytes per second when reading an array once: the best of a sum and of products with a vector.

    The array is float32 and far larger than any cache.
    """
    x = jnp.ones((int(gib * 2**28) // 4096, 4096), jnp.float32)
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


def print_table(rows):
    """A Markdown table of dicts with the same keys."""
    columns = list(rows[0])
    width = {c: max(len(c), *(len(str(row.get(c, ""))) for row in rows)) for c in columns}
    line = lambda cells: "| " + " | ".join(s.ljust(width[c]) for c, s in cells) + " |"  # noqa: E731
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
