"""What two real processes found, put together."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_system

from vlm_jax.program import passes

SCRIPT = """
import json, sys
import jax
import numpy as np
process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, process)
from vlm_jax.program import passes
# The second has more lines, longer ones, and the earlier rows.
own = [(7, "seven"), (3, {"a": 0.1})] if process == 0 else [(n, "x" * 50) for n in (0, 1, 2, 9)]
lines = passes.gather(own)
none = passes.gather([(5, 1 / 3)] if process else [])
sums = passes.add({"a": np.array([process + 1, 0.1]), "b": np.float64(1 / 3)})
parts = passes.parts(np.arange(3 * process) / 7)
print(json.dumps([lines, none, sums["a"].tolist(), float(sums["b"]), [x.tolist() for x in parts]]))
"""


@pytest.mark.slow
def test_two_processes_have_the_same_and_all_of_it():
    port = tiny_system.free_port()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny_system.ROOT)}
    environment["XLA_FLAGS"] = ""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(process), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(2)
    ]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in said)
    assert first == second
    lines, none, a, b, parts = first
    assert lines == ["x" * 50] * 3 + [{"a": 0.1}, "seven", "x" * 50]
    assert none == [1 / 3]  # every digit
    assert a == [3.0, 0.2] and b == 2 / 3
    assert parts == [[], [0.0, 1 / 7, 2 / 7]]


def test_one_process_has_its_own():
    assert passes.gather([(3, "c"), (1, "a")]) == ["a", "c"]
    sums = {"a": np.arange(2)}
    assert passes.add(sums) is sums
    assert [x.tolist() for x in passes.parts(np.arange(2))] == [[0, 1]]
