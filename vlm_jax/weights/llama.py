"""LLaMA weights of other programs: Hugging Face, EasyLM (LVM's own format), GGUF and Meta.

Names and layouts: `llama_layouts`; sizes: `llama_configs`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.models import llama
from vlm_jax.weights import bounds, convert, errors, llama_configs, llama_layouts, readers

# Tables and configs have files of their own; this is the door to all.
HF_RULES, EASYLM_RULES = llama_layouts.HF_RULES, llama_layouts.EASYLM_RULES
GGUF_RULES, META_RULES = llama_layouts.GGUF_RULES, llama_layouts.META_RULES
layout_of = llama_layouts.layout_of
first_blocks, first_tokens = llama_layouts.first_blocks, llama_layouts.first_tokens
config_from_hf, config_to_hf = llama_configs.config_from_hf, llama_configs.config_to_hf
config_from_meta = llama_configs.config_from_meta
config_from_gguf = llama_configs.config_from_gguf
config_from_shapes = llama_configs.config_from_shapes
PRESETS = llama.PRESETS
HF_STEM = "model"  # of the file names that transformers looks for


# ---- parameters ------------------------------------------------------------------------------


def abstract_params(cfg: llama.LlamaConfig) -> Mapping[str, Any]:
    """The tree that the converters fill: stacked layers, whatever `cfg` says of decoding."""
    stacked = dataclasses.replace(cfg, scan_layers=True, fused=False)
    return llama.make(stacked).abstract()


def from_hf(tensors: convert.Tensors, cfg: llama.LlamaConfig, shardings=None) -> dict[str, Any]:
    """`LlamaForCausalLM` tensors -> our parameters; see `convert.convert` for the errors."""
    return _convert(tensors, HF_RULES, cfg, shardings)


def from_easylm(tensors: convert.Tensors, cfg: llama.LlamaConfig, shardings=None) -> dict[str, Any]:
    """EasyLM tensors, of any of the four kinds, -> our parameters."""
    return _convert(llama_layouts.below_params(tensors), EASYLM_RULES, cfg, shardings)


def from_gguf(tensors: convert.Tensors, cfg: llama.LlamaConfig, shardings=None) -> dict[str, Any]:
    """llama.cpp tensors -> our parameters."""
    return _convert(tensors, GGUF_RULES, cfg, shardings)


def from_meta(tensors: convert.Tensors, cfg: llama.LlamaConfig, shardings=None) -> dict[str, Any]:
    """Tensors of Meta's `consolidated.00.pth` -> our parameters."""
    return _convert(tensors, META_RULES, cfg, shardings)


def from_native(tensors: convert.Tensors, cfg: llama.LlamaConfig, shardings=None) -> dict[str, Any]:
    """Our own paths, as `weights.export` writes them."""
    return _convert(tensors, convert.NATIVE_RULES, cfg, shardings)


def _convert(tensors, rules, cfg, shardings) -> dict[str, Any]:
    source, head = convert.source_of(tensors), llama_layouts.head_of(tensors, rules)
    if cfg.tie_embeddings and head == "own":
        raise errors.WeightsError(
            f"{source}: its head is not its embedding, but the model ties them; set "
            "model.tie_embeddings=False (tie_word_embeddings in a config.json)"
        )
    if not cfg.tie_embeddings and head == "none":
        raise errors.WeightsError(
            f"{source}: there is no head, and nothing says that it is the embedding; if it is, set "
            "tie_word_embeddings to true in its config.json (model.tie_embeddings in a recipe)"
        )
    return convert.convert(tensors, rules, abstract_params(cfg), ignorable(cfg), shardings)


def ignorable(cfg: llama.LlamaConfig) -> tuple[str, ...]:
    """Patterns of the tensors that may be there and are not used."""
    optimizer = (r"step", r"opt_state/.*")  # of an EasyLM training state
    # Some writers store the tied head a second time.
    tied = (r"lm_head[./](weight|kernel)", r"output\.weight") if cfg.tie_embeddings else ()
    return (llama_layouts.INV_FREQ, *optimizer, *tied)


def to_hf(params: Mapping[str, Any], cfg: llama.LlamaConfig) -> dict[str, Callable]:
    """Our parameters -> Hugging Face name -> function returning the array."""
    del cfg  # the tree says it all; kept so that every system's function looks alike
    return convert.revert(params, HF_RULES)


def to_meta(params: Mapping[str, Any]) -> dict[str, Callable]:
    """Our parameters -> Meta's name -> function returning the array; a tied head is written out."""
    loaders = convert.revert(params, META_RULES)
    return {"output.weight": loaders["tok_embeddings.weight"], **loaders}


# ---- whole checkpoints -----------------------------------------------------------------------


def from_tensors(tensors: convert.Tensors, cfg: llama.LlamaConfig, shardings=None):
    """Tensors in any of the five layouts -> our parameters."""
    read = dict(hf=from_hf, easylm=from_easylm, gguf=from_gguf, meta=from_meta, native=from_native)
    return read[layout_of(tensors)](tensors, cfg, shardings)


def load(
    path: str | os.PathLike,
    cfg: llama.LlamaConfig | None = None,
    shardings=None,
    *,
    blocks: int = 0,
    **overrides,
) -> tuple[llama.LlamaConfig, dict[str, Any]]:
    """Reads any of the five layouts.

    Args:
      path: what `readers.read` takes.
      cfg: sizes; None takes them from the file, a config.json or params.json beside it, or the
        shapes.
      shardings: see `convert.convert`.
      blocks: read only so many, from the first; 0 reads all.
      **overrides: config fields to replace, e.g. `param_dtype="bfloat16"`.

    Returns:
      (config, parameters).
    """
    _whole(path)
    tensors = readers.read(path)
    cfg = dataclasses.replace(cfg or config_of(tensors, path), **overrides)
    if blocks:
        tensors, cfg = first_blocks(tensors, blocks), dataclasses.replace(cfg, depth=blocks)
    return cfg, from_tensors(tensors, cfg, shardings)


def _whole(path):
    if (second := readers.folder_of(path) / "consolidated.01.pth").exists():
        raise errors.WeightsError(
            f"{second}: a model split over several files by Meta (13B and larger) is not "
            "supported; take the Hugging Face layout of it"
        )


def load_gguf(path: str | os.PathLike, **overrides) -> tuple[llama.LlamaConfig, dict[str, Any]]:
    """Reads a GGUF file: `cfg, params = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")`."""
    return load(path, **overrides)


# ---- configs ---------------------------------------------------------------------------------


def config_of(tensors: convert.Tensors, path: str | os.PathLike) -> llama.LlamaConfig:
    """The config from GGUF metadata, else the JSON file beside the weights, else the shapes.

    A head in the file that is not the embedding is kept, whatever the config says of tying; so do
    transformers from version 5 on.
    """
    layout = layout_of(tensors)
    cfg = _config_of(tensors, path, layout)
    if cfg.tie_embeddings and layout in llama_layouts.RULES:
        own = llama_layouts.below_params(tensors) if layout == "easylm" else tensors
        if llama_layouts.head_of(own, llama_layouts.RULES[layout]) == "own":
            return dataclasses.replace(cfg, tie_embeddings=False)
    return cfg


def _config_of(tensors, path, layout: str) -> llama.LlamaConfig:
    return _stated_config(tensors, path, layout) or config_from_shapes(tensors)


def _stated_config(tensors, path, layout: str) -> llama.LlamaConfig | None:
    """What GGUF metadata or a JSON file beside the weights say; None without either."""
    if layout == "gguf":
        try:
            return config_from_gguf(tensors.metadata, tied="output.weight" not in tensors)
        except KeyError as error:
            raise errors.WeightsError(f"{path}: no {error} in the metadata") from error
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise errors.WeightsError(f"{path}: metadata of no LLaMA ({error})") from error
    folder = readers.folder_of(path)
    if (folder / "config.json").exists():
        return readers.read_config(folder / "config.json", llama.LlamaConfig, config_from_hf)
    if layout == "meta" and (folder / "params.json").exists():
        rows = len(tensors["tok_embeddings.weight"])
        from_meta_file = functools.partial(config_from_meta, vocab_size=rows)
        return readers.read_config(folder / "params.json", llama.LlamaConfig, from_meta_file)
    return None


# What shapes do not tell: with another value the same weights compute another function. Field of
# the config -> the property that resolves it.
_STATED = {
    "num_heads": "num_heads",
    "num_kv_heads": "kv_heads",
    "head_width": "head_size",
    "rope_theta": "rope_theta",
    "rms_eps": "rms_eps",
}


def require_stated(
    tensors: convert.Tensors, path: str | os.PathLike, cfg: llama.LlamaConfig, section: str
) -> None:
    """Refuses weights for a model whose config is not the one that lies beside them.

    Args:
      tensors, path: of the checkpoint; without a config nothing is compared.
      cfg: of the model.
      section: of the recipe that sets it.

    Raises:
      WeightsError: a field differs, or the file's own config is not supported.
    """
    layout, file = layout_of(tensors), readers.folder_of(path) / "config.json"
    known = {"system", "num_attention_heads"}
    if layout != "gguf" and file.exists() and not known & set(bounds.read_json(file)):
        return  # another network's, that lies there too
    found = _stated_config(tensors, path, layout)
    for field, name in _STATED.items() if found else ():
        theirs, ours = getattr(found, name), getattr(cfg, name)
        if theirs != ours:
            raise errors.WeightsError(
                f"{path} was trained with {field}={theirs}, the model has {ours}: the same weights "
                f"would compute another function. Set {section}.{field}={theirs}"
            )
