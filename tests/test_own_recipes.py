"""Recipes anywhere on disk, on top of the shipped ones."""

import pathlib
import sys

import pytest

from vlm_jax import main as main_lib
from vlm_jax.program import recipes

RECIPE = """
from configs import lvm_3b

def get_config(arg=""):
    c = lvm_3b.tiny()
    c.train.steps = 7
    return c
"""


def values_of(*argv):
    argv = ["main", *map(str, argv)]
    values = main_lib._define_flags(main_lib._locate_recipe(argv))
    values(argv)
    return values["config"].value


@pytest.fixture(autouse=True)
def no_checkout(tmp_path, monkeypatch):
    """As in another folder, where `configs` is nobody's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(ROOT))])


ROOT = pathlib.Path(__file__).parents[1]


def test_a_recipe_anywhere_imports_the_shipped_ones(tmp_path):
    file = tmp_path / "mine" / "try.py"
    file.parent.mkdir()
    file.write_text(RECIPE)
    assert values_of(f"--config={file}").train.steps == 7
    assert values_of("--config", "mine/try.py").model.width == 128


def test_neighbours_come_first(tmp_path):
    for name, steps in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "base.py").write_text(f"STEPS = {steps}")
        text = RECIPE.replace("import lvm_3b", "import base, lvm_3b").replace("7", "base.STEPS")
        (tmp_path / name / "try.py").write_text(text)
        assert values_of(f"--config={name}/try.py").train.steps == steps


def test_shipped_ones_are_found_from_anywhere(capsys):
    assert values_of("--config=configs/lvm_3b.py:tiny").train.steps == 600
    assert values_of("--config=lvm_own.py", "--config.path=x").prepare.path == "x"
    with pytest.raises(SystemExit):
        values_of("--config=nothing.py")
    assert "no recipe nothing.py; shipped: lvm_1b.py, " in capsys.readouterr().err


@pytest.mark.parametrize("where", ["checkout", "wheel"])
def test_where_the_shipped_ones_are(where, tmp_path, monkeypatch):
    package = tmp_path / "vlm_jax"
    folder = (package if where == "wheel" else tmp_path) / "configs"
    folder.mkdir(parents=True)
    monkeypatch.setattr(recipes, "__file__", str(package / "program" / "recipes.py"))
    assert recipes.shipped() == folder


def test_a_mixture_is_given_whole():
    config = values_of(
        "--config=lvm_3b.py:tiny",
        "--config.data.mixture={'mine': {'type': 'array_record', 'path': 'tokens/*.array_record'}}",
        "--config.evals={}",
    )
    assert config.data.mixture.to_dict() == {
        "mine": {"type": "array_record", "path": "tokens/*.array_record"}
    }
    assert config.evals.to_dict() == {}
