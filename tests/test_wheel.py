"""A built wheel holds everything and works outside the checkout."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = tmp_path_factory.mktemp("checkout") / "vlm_jax"
    # From a copy: a build leaves folders behind, and picks up what an earlier one left.
    for name in ("vlm_jax", "configs", "third_party"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "-q", "-w", folder]
    out = subprocess.run(
        [*map(str, command), "--no-build-isolation"], capture_output=True, text=True, timeout=600
    )
    assert out.returncode == 0, out.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in ROOT.glob("vlm_jax/**/*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert "vlm_jax/py.typed" in names
    for path in [*ROOT.glob("configs/*.py"), *ROOT.glob("configs/parts/*.py")]:
        assert f"vlm_jax/{path.relative_to(ROOT)}" in names
    for path in (ROOT / "vlm_jax" / "assets").rglob("*"):
        if path.is_file():
            assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith(("tests", "configs", "benchmarks"))]


@pytest.mark.slow
def test_runs_outside_the_checkout(wheel, tmp_path, demo_data):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import vlm_jax; assert vlm_jax.__file__.startswith(sys.path[0]), vlm_jax.__file__\n"
        "from vlm_jax import main\n"
        "main.main(sys.argv)\n"
    )
    arguments = [
        "--config=configs/lvm_3b.py:tiny",
        "--workdir=run",
        "--config.train.steps=1",
        "--config.optim.warmup_steps=0",
        "--config.prepare.sentences=8",
        "--config.prepare.heldout_sentences=2",
        "--config.prepare.crops=8",
        "--config.evals={}",
    ]
    out = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoints" / "1" / "COMMIT.json").exists()


@pytest.mark.slow
def test_an_editable_install_is_found_beside_a_checkout_of_that_name(source, tmp_path):
    """A script beside the clone, in whose folder `vlm_jax` is a folder without __init__.py."""
    build = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    out = subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=source, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr[-3000:]
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (entry,) = [name for name in wheel.namelist() if "dist-info" not in name]
        assert entry.endswith(".pth") and wheel.read(entry).decode().strip() == str(source)
