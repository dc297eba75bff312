"""VQGAN weights in the layout of the released tokenizer (open-muse, LVM).

Our paths are the upstream names with '/' for '.'; a convolution is (out, in, kh, kw) there and
(kh, kw, in, out) here, and a norm's weight is called scale.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.models import vqgan
from vlm_jax.weights import bounds, convert, errors, readers, shipped


def _weight(match) -> str:
    return match[1].replace("/", ".") + ".weight"


def _bias(match) -> str:
    return match[1].replace("/", ".") + ".bias"


PRESETS = vqgan.PRESETS
HF_STEM = "pytorch_model"  # upstream's loader asks for pytorch_model.safetensors
HF_RULES = (
    convert.Rule(r"quantize/embedding", "quantize.embedding.weight"),
    convert.Rule(
        r"(.+)/kernel",
        _weight,
        load=lambda x, shape: x.transpose(2, 3, 1, 0),
        save=lambda x: x.transpose(3, 2, 0, 1),
    ),
    convert.Rule(r"(.+)/scale", _weight),
    convert.Rule(r"(.+)/bias", _bias),
)


def abstract_params(cfg: vqgan.VqganConfig) -> Mapping[str, Any]:
    """The tree that the converters fill."""
    return vqgan.make(cfg).abstract()


def from_hf(tensors: convert.Tensors, cfg: vqgan.VqganConfig, shardings=None) -> dict[str, Any]:
    """Upstream tensors -> our parameters; see `convert.convert` for the errors."""
    return convert.convert(tensors, HF_RULES, abstract_params(cfg), (), shardings)


def from_native(tensors: convert.Tensors, cfg: vqgan.VqganConfig, shardings=None) -> dict[str, Any]:
    """Our own paths, as `weights.export` writes them."""
    return convert.convert(tensors, convert.NATIVE_RULES, abstract_params(cfg), (), shardings)


def to_hf(params: Mapping[str, Any], cfg: vqgan.VqganConfig) -> dict[str, Callable]:
    """Our parameters -> upstream name -> function returning the array."""
    del cfg  # the tree says it all; kept so that every system's function looks alike
    return convert.revert(params, HF_RULES)


def layout_of(tensors: convert.Tensors) -> str:
    """One of "hf", "native"; WeightsError when the names tell nothing."""
    for sign, layout in (("quantize.embedding.weight", "hf"), ("quantize/embedding", "native")):
        if sign in tensors:
            return layout
    raise errors.WeightsError(
        f"{convert.source_of(tensors)}: not a VQGAN checkpoint: no "
        f"quantize.embedding.weight among its tensors {sorted(tensors)[:5]} ..."
    )


def from_tensors(tensors: convert.Tensors, cfg: vqgan.VqganConfig, shardings=None):
    """Tensors in either layout -> our parameters."""
    read = {"hf": from_hf, "native": from_native}[layout_of(tensors)]
    return read(tensors, cfg, shardings)


def ignorable(cfg: vqgan.VqganConfig) -> tuple[str, ...]:
    """Patterns of the tensors that may be there and are not used: none."""
    del cfg
    return ()


def load(
    path: str | os.PathLike, cfg: vqgan.VqganConfig | None = None, shardings=None
) -> tuple[vqgan.VqganConfig, dict[str, Any]]:
    """Reads a tokenizer.

    Args:
      path: a folder or file, see `readers.read`, or "tiny", which comes with the package.
      cfg: sizes; None takes them from the config.json beside the weights.
      shardings: see `convert.convert`.

    Returns:
      (config, parameters).
    """
    path = shipped.folder_of("vqgan", path)
    tensors = readers.read(path)
    cfg = cfg or config_beside(path)
    return cfg, from_tensors(tensors, cfg, shardings)


def config_of(tensors: convert.Tensors, path: str | os.PathLike) -> vqgan.VqganConfig:
    """See `config_beside`; every network's module has this function."""
    del tensors
    return config_beside(path)


def config_beside(path: str | os.PathLike) -> vqgan.VqganConfig:
    """The config.json beside the weights: shapes do not tell at which sides attention is applied.

    Raises:
      FileNotFoundError: nothing there, or no config.json.
      WeightsError: it is damaged, or not of a VQGAN.
    """
    found = shipped.folder_of("vqgan", path)
    file = readers.folder_of(found) / "config.json"
    if not pathlib.Path(os.fspath(found).rpartition("::")[2]).expanduser().exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if not file.exists():
        raise FileNotFoundError(
            f"{file} not found; put it there or name a preset: {', '.join(vqgan.PRESETS)}"
        )
    return readers.read_config(file, vqgan.VqganConfig, config_from_hf)


_FIELDS = {  # upstream key -> our field, where both mean the same
    "resolution": "resolution",
    "num_channels": "num_channels",
    "hidden_channels": "hidden_channels",
    "channel_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
    "z_channels": "z_channels",
    "num_embeddings": "num_embeddings",
    "quantized_embed_dim": "quantized_width",
    "commitment_cost": "commitment_cost",
}


def config_from_hf(fields: Mapping[str, Any]) -> vqgan.VqganConfig:
    """Upstream config.json -> our config. Every size must be there: upstream's defaults differ."""
    needed = (set(_FIELDS) - {"commitment_cost"}) | {"no_attn_mid_block"}
    if absent := sorted(needed - set(fields)):
        raise errors.WeightsError(f"{absent} missing; not a VQGAN config")
    sizes = {ours: fields[theirs] for theirs, ours in _FIELDS.items() if theirs in fields}
    if not isinstance(fields["no_attn_mid_block"], bool):
        raise errors.WeightsError(
            f"no_attn_mid_block is {fields['no_attn_mid_block']!r:.40}, not true or false"
        )
    # Not upstream's key: there the groups are always 32.
    groups = fields.get("norm_groups", 32)
    return bounds.make_config(
        vqgan.VqganConfig,
        **sizes,
        mid_attn=not fields["no_attn_mid_block"],
        resample_with_conv=fields.get("resample_with_conv", True),
        norm_groups=groups,
    )


def config_to_hf(cfg: vqgan.VqganConfig) -> dict[str, Any]:
    """The config.json of the released tokenizer's form."""
    fields = {theirs: getattr(cfg, ours) for theirs, ours in _FIELDS.items()}
    fields |= dict(
        no_attn_mid_block=not cfg.mid_attn, dropout=0.0, resample_with_conv=cfg.resample_with_conv
    )
    return fields | ({} if cfg.norm_groups == 32 else dict(norm_groups=cfg.norm_groups))
