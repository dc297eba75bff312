"""A system outside the package, its recipe, and how tests run it through the command line.

A language model of a few thousand parameters on lines of numbers. It uses everything that a run
must get right when it continues: dropout noise, augmentation, a schedule and moments.

    python -m vlm_jax.main --config=tests/tiny_system.py --workdir=W \
        --config.data.mixture.lines.path=numbers.jsonl
"""

import atexit
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
VOCAB, LENGTH = 32, 8


def get_config(arg=""):
    c = ml_collections.ConfigDict()
    c.system = "tests.tiny_system"
    c.model = dict(width=16)
    c.task = dict(noise=0.1)
    c.formatter = dict(sleep_s=0.0)
    c.optim = dict(lr=3e-3, schedule="linear", warmup_steps=5, decay_steps=1000, weight_decay=0.1)
    c.data = dict(mixture=dict(lines=dict(type="jsonl", path="")), num_threads=2)
    c.train = dict(steps=40, batch_size=8, seed=1, log_every=1, save_every=5, tensorboard=False)
    held_out = dict(mixture=dict(lines=dict(type="jsonl", path="")))
    c.evals = dict(held_out=dict(type="perplexity", predict="score", every=10, data=held_out))
    return c


@dataclasses.dataclass(frozen=True)
class Task:
    """Next number from one number, through one hidden layer."""

    width: int
    noise: float

    sharding_rules = (
        (r"^embed/table$", jax.sharding.PartitionSpec(None, "fsdp")),
        (r"^layers/\d+/kernel$", jax.sharding.PartitionSpec("fsdp", None)),
        (r"^head/kernel$", jax.sharding.PartitionSpec(None, "fsdp")),
    )

    @property
    def predict(self):
        return {"score": lambda params, batch, rng: {"logp": self._logp(params, batch, None)}}

    def init(self, rng):
        shapes = {
            "embed": {"table": (VOCAB, self.width)},
            "layers": {"0": {"kernel": (self.width, 4 * self.width)}},
            "head": {"kernel": (4 * self.width, VOCAB)},
        }
        flat, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        keys = jax.random.split(rng, len(flat))
        leaves = [0.3 * jax.random.normal(k, shape) for k, shape in zip(keys, flat, strict=True)]
        return jax.tree.unflatten(tree, leaves)

    def loss(self, params, batch, rng):
        logp = self._logp(params, batch, rng)
        loss = -(logp * batch["weights"]).sum() / batch["weights"].sum()
        return loss, {"certainty": jnp.exp(logp).mean()}

    def units_per_step(self, batch):
        return "tokens", float(np.prod(batch["tokens"].shape))

    def _logp(self, params, batch, rng):
        x = params["embed"]["table"][batch["tokens"]]
        if rng is not None:
            x = x + self.noise * jax.random.normal(rng, x.shape)
        x = jax.nn.gelu(x @ params["layers"]["0"]["kernel"])
        logp = jax.nn.log_softmax(x @ params["head"]["kernel"])
        return jnp.take_along_axis(logp, batch["targets"][..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Formatter:
    """A window at a random place of the line; `sleep_s` makes a run last long enough to kill.

    `log`: folder in which every process notes the first numbers of the lines that it reads.
    """

    sleep_s: float
    log: str = ""

    def __call__(self, record, rng):
        time.sleep(self.sleep_s)
        line = np.asarray(record["tokens"], np.int32)
        if self.log:
            with open(pathlib.Path(self.log) / f"{os.getpid()}.txt", "a") as file:
                file.write(f"{line[:3].tolist()}\n")
        start = int(rng.integers(len(line) - LENGTH))
        return {
            "tokens": line[start : start + LENGTH],
            "targets": line[start + 1 : start + 1 + LENGTH],
            "weights": np.ones(LENGTH, np.float32),
        }


def make_task(model, **fields):
    return Task(**model, **fields)


def make_formatter(**fields):
    return Formatter(**fields)


# ---- running it -----------------------------------------------------------------------------


def write_numbers(path):
    """64 lines of counting upwards by a step that differs between lines."""
    with open(path, "w") as file:
        for i in range(64):
            tokens = [(i + j * (1 + i % 3)) % VOCAB for j in range(20)]
            file.write(json.dumps({"tokens": tokens}) + "\n")
    return path


class Run:
    """One process of the program, its stderr kept in a file."""

    def __init__(self, workdir, numbers, *overrides, devices=1, process=None):
        """Starts it; `process` is (coordinator, number of processes, index) or None."""
        flags = [
            f"--config={ROOT / 'tests' / 'tiny_system.py'}",
            f"--workdir={workdir}",
            f"--config.data.mixture.lines.path={numbers}",
            f"--config.evals.held_out.data.mixture.lines.path={numbers}",
            *overrides,
        ]
        if process:
            coordinator, num_processes, index = process
            flags += [
                f"--coordinator={coordinator}",
                f"--num_processes={num_processes}",
                f"--process_id={index}",
            ]
        self.workdir = pathlib.Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        number = sum(path.name.startswith("stderr") for path in self.workdir.iterdir())
        self._log = self.workdir / f"stderr{number}.txt"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
            " --xla_cpu_enable_concurrency_optimized_scheduler=false",
            "PYTHONPATH": str(ROOT),
        }
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vlm_jax.main", *flags],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=ROOT,
            )
        atexit.register(self._process.kill)  # a failed test must not leave it running

    def stop(self, number=signal.SIGTERM):
        self._process.send_signal(number)

    def finish(self, timeout_s=300.0):
        """Exit status; a process that does not end is killed and fails the test."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.said()}") from None

    def running(self):
        return self._process.poll() is None

    def said(self):
        return self._log.read_text(errors="replace")

    def wait_until(self, condition, timeout_s=300.0, may_end=False):
        """Waits until `condition()`; fails the test if the process ends before that."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            if may_end and not self.running():
                return
            if not self.running() or time.monotonic() > end_s:
                self._process.kill()
                raise AssertionError(f"ended too early or got stuck:\n{self.said()}")
            time.sleep(0.005)

    def wait_for_step(self, step):
        """Waits until metrics.jsonl tells of `step`."""
        self.wait_until(lambda: any(line["step"] >= step for line in metrics(self.workdir)))


def train(workdir, numbers, *overrides, devices=1):
    """Runs to the end, which must be a good one; what it said."""
    run = Run(workdir, numbers, *overrides, devices=devices)
    assert run.finish() == 0, run.said()
    return run.said()


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_pair(workdir, numbers, *overrides):
    """Two processes of one device each, joined on this machine; `numbers` may be one for each."""
    each = numbers if isinstance(numbers, list) else [numbers, numbers]
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        Run(workdir, each[index], *overrides, process=(coordinator, 2, index)) for index in range(2)
    ]


def metrics(workdir):
    """Lines of metrics.jsonl in order, without the speed."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().split("\n")[:-1] if line]
    return [
        {key: x for key, x in json.loads(line).items() if not key.startswith("speed/")}
        for line in lines
    ]
