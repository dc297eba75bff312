"""Everything that can be configured is listed and explained."""

import pathlib

import pytest

from tests import test_recipes, tiny_system
from vlm_jax import main
from vlm_jax.program import config as config_lib
from vlm_jax.program import describe

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "config.md"


def test_the_page_is_current():
    assert PAGE.read_text() == describe.page(), f"{describe.__name__} makes {PAGE}"


def test_every_key_is_explained():
    silent = [
        f"{section.reader}: {row.key}"
        for _, sections in describe._all_sections()
        for section in sections
        for row in section.rows
        if not row.meaning
    ]
    assert not silent, "add them to Attributes or Args of the docstring"


def values_of(name, *overrides):
    argv = main._locate_recipe(["main", f"--config={test_recipes.CONFIGS / name}", *overrides])
    values = main._define_flags(argv)
    values(argv)
    return values["config"].value


@pytest.mark.parametrize("name", [
    "lvm_3b.py", "lvm_3b.py:small", "vqgan_f16.py:tiny_decoder", "nxtp_g3m.py:tiny",
    "nxtp_g3m.py", "lvm_own.py", "vqgan_own.py", "nxtp_own.py:released",
])  # fmt: skip
def test_every_value_of_a_recipe_is_shown(name):
    config = values_of(name)
    lines = describe.text(config).splitlines()
    shown = {line.partition("=")[0] for line in lines if line.startswith("--config.")}

    def keys(values, prefix):
        for key, value in values.items():
            path = f"{prefix}.{key}"
            if path not in shown and isinstance(value, dict):
                yield from keys(value, path)
            else:
                yield path

    plain = config_lib.plain(config)
    baselines = {key for key in keys(plain, "--config") if ".baseline." in key}
    assert set(keys(plain, "--config")) - baselines <= shown


def test_values_types_defaults_and_meanings():
    config = values_of("lvm_3b.py:tiny", "--config.train.steps=5")
    text = describe.text(config)
    for part in (
        "--config.system='lvm'    str, required",
        "--config.train.steps=5    int, required\n        updates in all.",
        "--config.train.accumulate=1    int, default 1",
        "--config.model.width=128    int, required\n        of the hidden states.",
        "--config.model.preset=",  # nothing: the recipe names none
        "--config.data.mixture.video.weight=1.0    float, default 1.0",
        "--config.evals.colorization.data.mixture.pairs.queries.split='heldout'",
        "--config.evals.colorization.formatter.images=7    int, required",
        "--config.prepare.crops=300    int, default 300",
    ):
        assert (part in text) == (part != "--config.model.preset="), part


def test_command_line(capsys):
    main.main(["main", "--config=nxtp_own.py", "--describe"])
    out = capsys.readouterr().out
    assert "--config.path=''    str | None, default None" in out
    assert "--config.model.decoder.preset='smollm2'" in out
    with pytest.raises(SystemExit, match="2"):
        main.main(["main", "--config=lvm_3b.py:tiny", "--config.model.widht=3", "--describe"])
    assert "did you mean 'width'" in capsys.readouterr().err


def test_meanings_are_taken_from_docstrings():
    class Reader:
        """Reads.

        Attributes:
          one, two: the first
            line goes on. three: in the same entry.
          four: own.

        Raises:
          five: is no key.
        """

    found = describe.documented(Reader, ["one", "two", "three", "four", "five"])
    assert found == {
        "one": "the first line goes on.",
        "two": "the first line goes on.",
        "three": "in the same entry.",
        "four": "own.",
    }


def test_a_system_from_elsewhere_is_described():
    assert "noise" in describe.text(tiny_system.get_config())
