"""The API reference as HTML, a page per module; a warning is an error.

pip install -e ".[docs]" && python docs/api.py FOLDER
"""

import pathlib
import re
import sys
import warnings

import pdoc
import pdoc.render

# pdoc looks for the types of a NamedTuple's fields in the module `typing`, and for those of private
# classes although it does not show them.
_NOT_OURS = re.compile(r"ForwardRef\(.*\) for [\w.]+\.__init__\.|for vlm_jax\.[\w.]*\._\w+")


def build(folder):
    """Writes the pages into the folder; returns what was complained about."""
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc("vlm_jax", output_directory=pathlib.Path(folder))
    # Other packages warn while they are imported.
    own = [str(w.message) for w in caught if "pdoc" in pathlib.Path(w.filename).parts]
    return [message for message in own if not _NOT_OURS.search(message)]


if __name__ == "__main__":
    problems = build(sys.argv[1])
    print("\n".join(problems), file=sys.stderr)
    sys.exit(1 if problems else 0)
