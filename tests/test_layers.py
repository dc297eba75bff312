"""Floors: imports point down only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "vlm_jax"

# What each part may import of vlm_jax besides itself. `config` and `task` are contracts without
# dependencies, `hardware` is a table; everybody may read them.
CONTRACTS = {"config", "task", "hardware"}
# A network with its data side, and models as folders to take away, for the systems above them.
SHARED = {"image_tokenizer", "text_embedder", "memory", "saving"}
# Models to take away, and the memory that they need: single files, and what each may import.
TAKING_AWAY = {
    "memory": {"nn"},
    "saving": {"nn", "weights", "provenance", "model_card"},
    "model_card": {"saving", "released"},
    "released": {"models", "weights", "systems"},
}
ALLOWED = {
    "ops": set(),
    "nn": {"ops"},
    "models": {"nn", "ops"},
    "decoding": {"ops"},
    "metrics": {"models", "ops"},
    "data": set(),
    "datasets": {"data"},
    "weights": {"data", "memory", "models", "nn"},
    "systems": SHARED
    | {"models", "nn", "ops", "decoding", "weights", "data", "datasets", "metrics"},
    "evaluators": SHARED | {"metrics", "data", "models", "weights", "curves"},
}
PROGRAM_NEVER = {"models", "systems", "datasets", "decoding"}
PROGRAM = {
    "main",
    "recipes",
    "run",
    "train",
    "what_next",
    "update",
    "recorded",
    "workdir_files",
    "evaluate",
    "evaluate_alone",
    "optim",
    "sharding",
    "checkpoints",
    "checkpoint_reading",
    "leaves",
    "step_folders",
    "resume",
    "scores",
    "metric_writer",
    "trackers",
    "progress",
    "compilation_cache",
    "console",
    "curves",
    "describe",
    "starting_point",
    "stop_signal",
    "guards",
    "distributed",
    "peers",
    "peer_hub",
    "process_end",
    "requirements",
    "workdir_lock",
}
# The front doors that users call may reach everything.
DOORS = {"loading", "predict", "tools"}


def imports_of(path):
    """Top-level parts of vlm_jax that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "vlm_jax":
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                found.update(names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "vlm_jax" and len(parts) > 1:
                    found.add(parts[1])
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_libraries_import_downwards(part):
    files = sorted((ROOT / part).rglob("*.py"))
    assert files
    for path in files:
        allowed = ALLOWED[part] | CONTRACTS | {part}
        if path.name == "command_line.py":  # the front door of a system
            allowed = allowed | {"loading"}
        extra = imports_of(path) - allowed
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


@pytest.mark.parametrize("part", TAKING_AWAY)
def test_what_is_taken_away_imports_downwards(part):
    assert imports_of(ROOT / f"{part}.py") <= TAKING_AWAY[part] | CONTRACTS


def test_program_knows_no_system():
    for name in PROGRAM:
        path = ROOT / f"{name}.py"
        assert not imports_of(path) & PROGRAM_NEVER, name
        for system in ("lvm", "vqgan", "nxtp", "nextchat", "pixelllm"):
            code = "\n".join(
                ast.unparse(node)
                for node in ast.parse(path.read_text()).body
                if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            )
            assert f"'{system}'" not in code, f"{name} names {system}"


def test_systems_do_not_import_each_other():
    for system in (ROOT / "systems").iterdir():
        for path in system.rglob("*.py") if system.is_dir() else ():
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "vlm_jax.systems."
                ):
                    assert node.module.split(".")[2] == system.name, path


def test_every_part_is_on_a_floor():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(("_", "."))}
    parts = {name.removesuffix(".py") for name in names - {"py.typed"}}
    other = SHARED | set(TAKING_AWAY) | {"assets", "configs", "provenance", "commit_marker"}
    assert parts <= set(ALLOWED) | PROGRAM | DOORS | CONTRACTS | other, "a part without a floor"


def test_networks_import_jax_flax_numpy_only():
    allowed = {"jax", "flax", "numpy", "vlm_jax"}
    standard = {"__future__", "contextlib", "contextvars", "dataclasses", "functools", "math"}
    standard |= {"collections", "typing", "itertools", "enum"}
    for part in ("ops", "nn", "models", "decoding"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                for name in names:
                    assert name.split(".")[0] in allowed | standard, f"{path}: {name}"
