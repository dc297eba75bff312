"""The card of a saved model: README.md, in the form that model hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax import saving
from vlm_jax.saving import released

_USES = {
    "lvm": "model.continue_([frame1, frame2, frame3], n=1)",
    "nxtp": 'model.label("photo.jpg")',
    "vqgan": "ids = model.encode(picture); model.decode_u8(ids[None])",
}


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
        f'model = vlm_jax.load("{system}", "PATH OF THIS FOLDER")\n{_USES.get(system, "model")}\n'
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
    known = released.named_in(" ".join((source.name, *source.started_from)))
    if "vgg" in str(parts.sections.get("model", {}).get("vision", {}).get("preset", "")):
        known.append(released.VGG16)
    lines = [f"- {item.name}: {item.licence}." for item in dict.fromkeys(known)]
    lines += [f"- The model in `{name}/` has a card of its own." for name in parts.inner]
    lines.append(
        "- The terms of the data, and of weights that are not named here, are not known to the "
        "program that wrote this card: state them before passing it on.\n"
    )
    return lines
