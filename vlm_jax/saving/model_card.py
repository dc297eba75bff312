"""The card of a saved model: README.md, in the form that model hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax import saving
from vlm_jax import task as task_lib
from vlm_jax.saving import released


def text(parts: saving.Parts, config: Mapping[str, Any], dtype: str) -> str:
    """The card.

    Args:
      parts: of the model.
      config: what was written to config.json.
      dtype: of the file of parameters.
    """
    system = parts.system
    blocks = [
        f"---\nlibrary_name: vlm_jax\ntags: [vlm_jax, {system}]\n---\n",
        f"# {parts.title or system}\n",
        "```python\nimport vlm_jax\n\n"
        f'model = vlm_jax.load("{system}", "PATH OF THIS FOLDER")\n{_use(system)}\n'
        "```\n",
        "## Where it came from\n",
        *_origin(parts.source),
        f"- Stored in {dtype}. `--config.init.run=THIS_FOLDER` starts training from it.\n",
        "## Licences\n",
        *_licences(parts),
        "## Versions\n",
        ", ".join(f"{name} {version}" for name, version in config["versions"].items()) + "\n",
        "## Files\n",
        "| file | SHA-256 |\n|---|---|",
        *(f"| {name} | `{digest}` |" for name, digest in config["files"].items()),
    ]
    return "\n".join(blocks) + "\n"


def _use(system: str) -> str:
    """The system's own example of what its models do."""
    return getattr(task_lib.resolve(system, "systems"), "EXAMPLE", "model")


def _origin(source: saving.Source) -> list[str]:
    """What is known of the training, a list item each."""
    lines = [f"- Made from: {source}." if source.name else "- Not known: it was made in a program."]
    lines += [f"- Training started from `{name}`." for name in source.started_from]
    if source.data:
        lines.append(f"- Trained on: {', '.join(source.data)}.")
    return lines


def _licences(parts: saving.Parts) -> list[str]:
    """What the weights that it was made from ask for, as far as they are known here."""
    source = parts.source
    preset = str(parts.sections.get("model", {}).get("vision", {}).get("preset", ""))
    known = released.named_in(" ".join((source.name, *source.started_from, preset)))
    lines = [f"- {item.name}: {item.licence}." for item in dict.fromkeys(known)]
    lines += [f"- The model in `{name}/` has a card of its own." for name in parts.inner]
    lines.append(
        "- The terms of the data, and of weights that are not named here, are not known to the "
        "program that wrote this card: state them before passing it on.\n"
    )
    return lines
