"""Imports are cheap, and --help answers before anything heavy is loaded."""

import subprocess
import sys
import time

HEAVY = ("tensorflow", "torch", "transformers", "grain", "orbax", "PIL", "av", "matplotlib")


def modules_after(statement):
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return {name.split(".")[0] for name in out.stdout.split()}


def test_importing_the_package_imports_nothing_else():
    assert not {"jax", "flax", "numpy"} & modules_after("import vlm_jax")


def test_a_network_loads_nothing_heavy():
    loaded = modules_after("import vlm_jax.models.llama")
    ours = {name for name in HEAVY if name in loaded}
    # What flax itself brings is not ours to choose.
    theirs = modules_after("from flax import nnx")
    assert ours <= theirs, ours - theirs
    assert not {"tensorflow", "torch", "transformers", "grain"} & loaded


def test_the_training_path_loads_neither_tensorflow_nor_torch():
    loaded = modules_after("import vlm_jax.program.run")
    assert not {"tensorflow", "torch", "transformers"} & loaded


def test_help_answers_without_jax():
    start = time.monotonic()
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vlm_jax.main", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "--workdir" in out.stdout + out.stderr
    imported = {line.rpartition("|")[2].strip() for line in out.stderr.splitlines()}
    assert not {"jax", "flax", "grain", "orbax"} & imported
    # Reported, not asserted: times depend on the machine.
    print(f"--help answered in {time.monotonic() - start:.2f} s")
