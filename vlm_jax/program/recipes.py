"""Where recipes are: anywhere on disk; those that come with the package; `from configs import`.

A recipe anywhere may say `from configs import lvm_3b`, and gets its own neighbours first, then the
shipped recipes, whether these lie in a checkout or were installed.
"""

import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

# Sections that a recipe may leave out, and an override may still reach into.
OPTIONAL = ("task", "formatter", "optim", "mesh", "init", "evals", "prepare")


def shipped() -> pathlib.Path:
    """The folder of the recipes that come with the package."""
    here = pathlib.Path(__file__).resolve().parents[1]
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def find(path: str) -> pathlib.Path:
    """The file of a recipe: as it is given, else the shipped one of that name.

    Raises:
      FileNotFoundError: neither; names the shipped ones.
    """
    file = pathlib.Path(path).expanduser()
    if file.is_file():
        return file
    if (known := shipped() / file.name).is_file():
        return known
    names = ", ".join(sorted(other.name for other in shipped().glob("*.py")))
    raise FileNotFoundError(f"no recipe {path}" + (f"; shipped: {names}" if names else ""))


def make_importable(recipe: pathlib.Path) -> None:
    """Lets the recipe say `from configs import other`, see the module."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]  # neighbours of another recipe
    configs = types.ModuleType("configs")
    configs.__path__ = [str(recipe.absolute().parent), str(shipped())]
    sys.modules["configs"] = configs


def complete(made: Any) -> Any:
    """What `get_config` returned, as a ConfigDict in which every section is there.

    Raises:
      ValueError: it is no config.
    """
    import ml_collections

    if isinstance(made, ml_collections.FrozenConfigDict) or type(made) is dict:
        made = ml_collections.ConfigDict(made)
    if not isinstance(made, ml_collections.ConfigDict):
        raise ValueError(f"get_config() returned {made!r:.60}, not an ml_collections.ConfigDict")
    for name in OPTIONAL:
        if name not in made:
            made[name] = ml_collections.ConfigDict()
    return made


def checked(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """`load`, which runs a recipe, with what comes of it completed.

    Raises:
      ValueError: it is no recipe, or ends the program.
    """

    def run(path: str) -> Any:
        try:
            return complete(load(path))
        except SystemExit as error:
            raise ValueError(f"it ends the program, by sys.exit({error.code!r})") from error
        except KeyError as error:  # not of an override
            raise ValueError(f"KeyError: {error}") from error

    return run
