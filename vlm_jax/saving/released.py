"""Released weights that the systems read: names, sizes, licences, memory, and a first check.

    python -m vlm_jax.saving.released > docs/weights.md

What upstream does not state is "unknown" here. Memory is computed from the shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

UNKNOWN = "unknown"
_TEXT = """\
<!-- made by: python -m vlm_jax.saving.released > docs/weights.md -->
# Released weights

Every released file that the systems read. Sizes are those of the published files; sums are what
upstream publishes (of NXTP and CLIP the beginning), and `sha256sum FILE` has to agree. Hugging
Face's command line (`hf`, of the package huggingface_hub) fetches by name; gated models ask for a
token, which belongs into the environment and never on the command line. "Unknown" means that
upstream says nothing about it.

Memory is that of the parameters once, in GiB; loading needs up to twice as much for a moment, and
`load` refuses before it reads when that is not free. Activations and caches come on top.

{table}

## Fetching

{fetching}

## The first thing to check

{checks}

Licences bind whoever uses the weights: those of NXTP and LLaMA restrict use. More on papers, data
and licences: [third_party/NOTICE.md](../third_party/NOTICE.md).
"""


@dataclasses.dataclass(frozen=True)
class Released:
    """One release.

    Attributes:
      name: of the table.
      hub: name on its hub; "" without one.
      pattern: regex that finds it in the name of a file or folder.
      systems: that read it.
      size: of its files.
      sums: beginnings of checksums that upstream publishes.
      licence: as far as stated.
      shapes: function returning the abstract parameters that are loaded.
      fetch: command.
      check: what to do first, and what comes out; Markdown.
    """

    name: str
    hub: str
    pattern: str
    systems: str
    size: str
    sums: str
    licence: str
    shapes: Callable[[], Mapping[str, Any]]
    fetch: str
    check: str


HF = "hf download {} --local-dir {}"


def llama(preset: str, **changes: Any) -> Callable[[], Mapping[str, Any]]:
    """Function that returns the shapes of a LLaMA."""

    def shapes():
        from vlm_jax.models import llama
        from vlm_jax.weights import llama as llama_weights

        return llama_weights.abstract_params(dataclasses.replace(llama.PRESETS[preset], **changes))

    return shapes


def everything() -> list[Released]:
    """Those of all systems: `RELEASES` of systems/*/releases.py."""
    found = []
    for path in sorted(pathlib.Path(__file__).parents[1].glob("systems/*/releases.py")):
        name = f"vlm_jax.systems.{path.parent.name}.releases"
        found += importlib.import_module(name).RELEASES
    return found


def named_in(text: str) -> list[Released]:
    """The releases whose usual names are in the text."""
    return [release for release in everything() if re.search(release.pattern, text)]


def num_params(release: Released) -> int:
    """Parameters that are loaded."""
    return _count(release.shapes)


@functools.cache  # tracing a network of this size takes seconds
def _count(shapes: Callable[[], Mapping[str, Any]]) -> int:
    return sum(int(np.prod(x.shape, dtype=np.int64)) for x in jax.tree.leaves(shapes()))


def page() -> str:
    """The page about them."""
    lines = [
        "| weights | name on its hub | read by | files | checksum begins | licence | parameters "
        "| bfloat16 | float32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for release in everything():
        count = num_params(release)
        gib = [f"{count * size / 2**30:.2f}" for size in (2, 4)]
        cells = [
            release.name,
            release.hub or "none",
            release.systems,
            release.size,
            release.sums,
            release.licence,
            f"{count:,}",
            *gib,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    commands = [release for release in everything() if release.fetch.startswith("hf ")]
    fetching = ["```bash", *(release.fetch for release in commands), "```", ""]
    fetching += [f"- {r.name}: {r.fetch}." for r in everything() if r not in commands]
    checks = [f"- **{release.name}.** {release.check}" for release in everything()]
    return _TEXT.format(
        table="\n".join(lines), fetching="\n".join(fetching), checks="\n".join(checks)
    )


if __name__ == "__main__":
    sys.stdout.write(page())
