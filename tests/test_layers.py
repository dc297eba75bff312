"""Floors: imports point down only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "vlm_jax"

# What each part may import of vlm_jax besides itself. `program.config`, `answer` and `task` are
# contracts without dependencies, `machines.hardware` is a table; everybody may read them.
CONTRACTS = {"program.config", "answer", "task", "machines.hardware"}
# A network with its data side, and models as folders to take away, for the systems above them.
SHARED = {"encoders", "machines.memory", "saving"}
ALLOWED = {
    "ops": set(),
    "nn": {"ops"},
    "models": {"nn", "ops"},
    "decoding": {"ops"},
    "metrics": {"models", "ops"},
    "data": set(),
    "datasets": {"data"},
    "weights": {"data", "machines.memory", "models", "nn"},
    "saving": {"nn", "weights", "program.provenance", "models", "systems"},
    "encoders": {"data", "models", "nn", "ops", "saving", "weights"},
    "systems": SHARED
    | {"models", "nn", "ops", "decoding", "weights", "data", "datasets", "metrics"},
    "evaluators": SHARED
    | {"metrics", "data", "models", "weights", "program.curves", "program.passes"},
}
PROGRAM = {"main", "program", "machines", "checkpoints"}
PROGRAM_NEVER = {"models", "systems", "datasets", "decoding"}
# The front doors that users call may reach everything.
DOORS = {"loading", "predict", "task", "answer", "tools"}


def imports_of(path):
    """Parts of vlm_jax that a file imports: each folder or door, and that with the name in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "vlm_jax" and len(parts) > 1:
                found.add(parts[1])
                found.add(".".join(parts[1:3]))
    return found


def extra_imports(path, allowed):
    """What a file imports beyond `allowed`, where a folder may be allowed in part."""
    partly = {name.split(".")[0] for name in allowed if "." in name}
    return {
        name
        for name in imports_of(path)
        if name not in allowed
        and name.split(".")[0] not in allowed
        and not ("." not in name and name in partly)
    }


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_libraries_import_downwards(part):
    files = sorted((ROOT / part).rglob("*.py"))
    assert files
    for path in files:
        allowed = ALLOWED[part] | CONTRACTS | {part}
        if path.parent.name == "evaluators":
            allowed = allowed | ALLOWED["evaluators"]
        if path.name == "command_line.py":  # the front door of a system
            allowed = allowed | {"loading", "machines.console"}
        extra = extra_imports(path, allowed)
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def program_files():
    for name in PROGRAM:
        yield from (ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]


def test_program_knows_no_system():
    for path in program_files():
        assert not {name.split(".")[0] for name in imports_of(path)} & PROGRAM_NEVER, path
        for system in ("lvm", "vqgan", "nxtp", "nextchat", "pixelllm"):
            code = "\n".join(
                ast.unparse(node)
                for node in ast.parse(path.read_text()).body
                if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            )
            assert f"'{system}'" not in code, f"{path} names {system}"


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
    assert parts <= set(ALLOWED) | PROGRAM | DOORS | {"assets", "configs"}, "a part without a floor"


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


# Doors and tools that are of one system by their purpose; see docs/architecture.md.
OF_ONE_SYSTEM = {
    "encoders/image_tokenizer.py",  # what `load("vqgan")` gives, and several systems use
    "loading.py",  # types of what `load` gives, for editors
    "tools/extract_labels.py",
    "tools/token_preview.py",
    "tools/token_shards.py",
    "tools/tokenize_images.py",
}


def test_nobody_outside_imports_or_compares_a_system():
    """A system takes part by being a folder: converters, releases, evaluators, examples."""
    systems = {path.name for path in (ROOT / "systems").iterdir() if (path / "task.py").exists()}
    assert {"lvm", "nxtp", "vqgan"} <= systems
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("systems/") or name in OF_ONE_SYSTEM:
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                package = (node.module or "").split(".")
                assert package[:2] != ["vlm_jax", "systems"], f"{name} imports {node.module}"
            if isinstance(node, ast.Compare):
                words = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)}
                assert not words & systems, f"{name}:{node.lineno} asks for a system by name"
            if isinstance(node, ast.Dict):
                words = {x.value for x in node.keys if isinstance(x, ast.Constant)}
                assert not words & systems, f"{name}:{node.lineno} lists systems"
