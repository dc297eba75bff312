"""Where recipes are: anywhere on disk; those that come with the package; `from configs import`.

A recipe anywhere may say `from configs import lvm_3b`, and gets its own neighbours first, then the
shipped recipes, whether these lie in a checkout or were installed.
"""

import pathlib
import sys
import types


def shipped() -> pathlib.Path:
    """The folder of the recipes that come with the package."""
    here = pathlib.Path(__file__).resolve().parent
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
