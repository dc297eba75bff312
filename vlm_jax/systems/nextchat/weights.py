"""NExT-Chat weights in the released layout, and what training starts from.

    model.embed_tokens, model.layers, model.norm, lm_head   the language model, five rows longer
    model.vision_tower.*                                    CLIP of Hugging Face, without projection
    model.mm_projector.*                                    .0, .2, ...; one matrix alone: no number
    loc_encoder.*, loc_decoder.*                            boxes in and out
    seg_prompt_mlp.*, sam.model.*                           masks; SAM in Meta's names

The tower is missing where training was sharded; it comes from a CLIP file then. Masks are missing
before stage 3. Upstream keeps the tower in float16 and reads it anew from its own file, so its
values are rounded to float16 here whatever they come from.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_jax.models import clip as clip_model
from vlm_jax.models import llama as llama_model
from vlm_jax.nn import functional
from vlm_jax.systems.nextchat import network
from vlm_jax.weights import bounds, clip, convert, errors, export, lazy, llama, readers, sam

_TOWER, _PROJECTOR = "model.vision_tower.", "model.mm_projector."
_SAM = "sam.model."
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LINEAR = (lambda x, shape: x.T, lambda x: x.T)
# Parts that a checkpoint may lack, by the beginning of their names.
OPTIONAL = {"vision": _TOWER, "mask_prompt": "seg_prompt_mlp.", "sam": _SAM}
# Patterns of tensors that nobody reads: angles of rotary embedding, counts of positions.
IGNORED = (r"(.*\.)?rotary_emb\.inv_freq", r"(.*\.)?embeddings\.position_ids")


def _under(ours: str, theirs: str, rules, chosen=".*") -> tuple[convert.Rule, ...]:
    def renamed(rule):
        if isinstance(rule.theirs, str):
            return dataclasses.replace(rule, ours=ours + rule.ours, theirs=theirs + rule.theirs)
        return dataclasses.replace(
            rule, ours=ours + rule.ours, theirs=lambda match: theirs + rule.theirs(match)
        )

    return tuple(renamed(rule) for rule in rules if re.match(chosen, rule.ours))


def _perceptron(ours: str, theirs: str) -> tuple[convert.Rule, ...]:
    """Their numbers count the activations too."""

    def name(match, kind):
        return f"{theirs}{2 * int(match[1])}.{kind}"

    path = rf"{ours}/layers/(\d+)/"
    return (
        convert.Rule(path + "kernel", functools.partial(name, kind="weight"), *_LINEAR),
        convert.Rule(path + "bias", functools.partial(name, kind="bias")),
    )


def rules(projector_depth: int = 2) -> tuple[convert.Rule, ...]:
    """Between the released names and our paths; a projector of one matrix has another name."""
    projector = _perceptron("projector", _PROJECTOR)
    if projector_depth == 1:
        name = _PROJECTOR.removesuffix(".")
        projector = (
            convert.Rule("projector/layers/0/kernel", name + ".weight", *_LINEAR),
            convert.Rule("projector/layers/0/bias", name + ".bias"),
        )
    return (
        *_under("", _TOWER, clip.HF_RULES, "vision/(?!projection)"),
        *projector,
        *_under("decoder/", "", llama.HF_RULES),
        *_perceptron("box_encoder", "loc_encoder."),
        *_perceptron("box_decoder", "loc_decoder."),
        *_perceptron("mask_prompt", "seg_prompt_mlp."),
        *_under("sam/", _SAM, sam.META_RULES),
    )


def read(path: str | os.PathLike, clip_path: str | os.PathLike = "") -> lazy.Tensors:
    """A checkpoint, and the image tower of a CLIP file where it is given.

    The file's tower goes before the checkpoint's, as upstream has it.

    Raises:
      FileNotFoundError, WeightsError: see `readers.read`.
    """
    tensors = readers.read(path)
    return over_clip(tensors, clip.read(clip_path)) if clip_path else tensors


def over_clip(tensors: convert.Tensors, clip_tensors: convert.Tensors) -> lazy.Tensors:
    """The tensors with the tower of a CLIP file in any layout."""
    loaders = {name: lazy.item(tensors, name) for name in tensors if not name.startswith(_TOWER)}
    source = convert.source_of(clip_tensors)
    cfg = dataclasses.replace(clip.vision_config_of(clip_tensors, source), projection=0)
    params = {"vision": clip.vision_from_tensors(clip_tensors, cfg)}
    for name, load in convert.revert(params, clip.HF_RULES).items():
        loaders[_TOWER + name] = load
    return lazy.Tensors(loaders, f"{convert.source_of(tensors)} with the tower of {source}")


def over_sam(tensors: convert.Tensors, sam_tensors: convert.Tensors) -> lazy.Tensors:
    """The tensors, and of SAM what they lack from a file of its own, in either layout.

    A trained mask decoder goes before the file's, as upstream has it.
    """
    source = convert.source_of(sam_tensors)
    params = sam.from_tensors(sam_tensors, sam.config_of(sam_tensors))
    loaders = {_SAM + name: load for name, load in sam.to_meta(params).items()}
    loaders |= {name: lazy.item(tensors, name) for name in tensors}
    return lazy.Tensors(loaders, f"{convert.source_of(tensors)} over {source}")


def from_tensors(
    tensors: convert.Tensors, abstract: Mapping[str, Any], shardings=None
) -> dict[str, Any]:
    """Released tensors -> our parameters.

    Args:
      tensors: see `read`.
      abstract: our tree, or some of its parts.
      shardings: see `convert.convert`.

    Returns:
      A tree like `abstract`, without the optional parts that the checkpoint has nothing of.

    Raises:
      ConversionError: see `convert.convert`.
    """
    lacking = {part for part, name in OPTIONAL.items() if not _any_under(tensors, name)}
    wanted = {part: tree for part, tree in abstract.items() if part not in lacking}
    ignored = [*IGNORED]
    if "lm_head" not in abstract.get("decoder", {"lm_head": None}) and _HEAD in tensors:
        if not np.array_equal(tensors[_HEAD], tensors[_TABLE]):
            raise errors.WeightsError(
                f"{convert.source_of(tensors)}: its head is not its embedding, but the model ties "
                "them; set model.decoder.tie_embeddings=False"
            )
        ignored.append(re.escape(_HEAD))
    for part, name in OPTIONAL.items():
        if part not in abstract:
            ignored.append(re.escape(name) + ".*")
    if shardings is not None:
        shardings = {part: shardings[part] for part in wanted}
    table = rules(_projector_depth(abstract))
    return convert.convert(sam.cut(_rounded(tensors)), table, wanted, ignored, shardings)


def _any_under(tensors, name: str) -> bool:
    return any(other.startswith(name) for other in tensors)


def _projector_depth(abstract) -> int:
    return len(abstract["projector"]["layers"]) if "projector" in abstract else 2


def _rounded(tensors: convert.Tensors) -> lazy.Tensors:
    def load(name):
        x = tensors[name]
        return x.astype(np.float16).astype(x.dtype) if name.startswith(_TOWER) else x

    loaders = {name: functools.partial(load, name) for name in tensors}
    return lazy.Tensors(loaders, convert.source_of(tensors), getattr(tensors, "metadata", None))


# ---- writing ---------------------------------------------------------------------------------


def to_upstream(params: Mapping[str, Any]) -> dict[str, Callable]:
    """Our parameters -> the released name -> function returning the array."""
    return sam.join(convert.revert(params, rules(_projector_depth(params))))


def shapes_of(abstract: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The released name -> shape of every tensor; allocates nothing."""
    return sam.join_shapes(convert.reverted_shapes(abstract, rules(_projector_depth(abstract))))


def checkpoint(
    params: Mapping[str, Any],
    cfg: network.NextChatConfig,
    dtype="float32",
    tower="openai/clip-vit-large-patch14-336",
) -> export.Checkpoint:
    """What `export.write` writes: a folder that the released program loads.

    Args:
      params: in the training layout.
      cfg: of the network.
      dtype: of the file.
      tower: where the released program finds its CLIP; its tower is not read from the file.
    """
    shapes, tensors = shapes_of(params), to_upstream(params)
    if cfg.decoder.tie_embeddings:  # upstream knows no tied heads
        tensors[_HEAD], shapes[_HEAD] = tensors[_TABLE], shapes[_TABLE]
    fields = config_to_upstream(cfg) | {"mm_vision_tower": tower, "torch_dtype": str(dtype)}
    files = {"config.json": fields}
    return export.Checkpoint(tensors, shapes, np.dtype(dtype), "model", {"format": "pt"}, files)


# ---- configs ---------------------------------------------------------------------------------


def config_to_upstream(cfg: network.NextChatConfig) -> dict[str, Any]:
    """The config.json of the released layout."""
    fields = llama.config_to_hf(cfg.decoder) | dict(
        architectures=["NextChatForSegLM"],
        model_type="nextchat",
        tie_word_embeddings=False,
        use_mm_proj=True,
        mm_hidden_size=cfg.vision.width,
        mm_vision_select_layer=-2,
        mm_depth=cfg.projector_depth,
        mm_use_im_start_end=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return fields


def config_of(
    tensors: convert.Tensors, path: str | os.PathLike, vision: clip_model.VisionConfig | None = None
) -> network.NextChatConfig:
    """Sizes from config.json and the shapes; with masks where the checkpoint has SAM.

    Args:
      tensors: of the checkpoint.
      path: of the checkpoint; the folder holds its config.json.
      vision: of the tower, where the checkpoint has none.

    Raises:
      WeightsError: a config.json of another kind, or no tower and no `vision`.
    """
    file = readers.folder_of(path) / "config.json"
    decoder = readers.read_config(file, llama_model.LlamaConfig, _decoder_config)
    if vision is None:
        if not _any_under(tensors, _TOWER):
            raise errors.WeightsError(
                f"{path} has no image tower; give the CLIP file that it was trained with, "
                "openai/clip-vit-large-patch14-336"
            )
        # Of the tower's own fields there are none in released files: shapes tell, as CLIP's do.
        told = "num_attention_heads" in bounds.read_json(file).get("vision_config", {})
        vision = clip.vision_config_of(_inside(tensors, _TOWER), path if told else "")
    depth = sum(re.fullmatch(re.escape(_PROJECTOR) + r"\d+\.weight", name) is not None
                for name in tensors)  # fmt: skip
    masks = sam.config_of(_inside(tensors, _SAM)) if _any_under(tensors, _SAM) else None
    return network.NextChatConfig(vision, decoder, depth or 1, masks)


def _inside(tensors: convert.Tensors, beginning: str) -> lazy.Tensors:
    """The tensors of a part, under its own names."""
    inner = {name.removeprefix(beginning): name for name in tensors if name.startswith(beginning)}
    loaders = {new: lazy.item(tensors, old) for new, old in inner.items()}
    return lazy.Tensors(loaders, convert.source_of(tensors))


def require_stated(path: str | os.PathLike, cfg: network.NextChatConfig) -> None:
    """Refuses a checkpoint whose config.json says what the model has otherwise.

    Raises:
      WeightsError: heads, angles or norms differ, which shapes do not tell.
    """
    file = readers.folder_of(path) / "config.json"
    if not file.exists():
        return
    found = readers.read_config(file, llama_model.LlamaConfig, _decoder_config)
    for field in ("num_heads", "kv_heads", "head_size", "rope_theta", "rms_eps"):
        theirs, ours = getattr(found, field), getattr(cfg.decoder, field)
        if theirs != ours:
            raise errors.WeightsError(
                f"{path} was trained with {field}={theirs}, the model has {ours}: the same weights "
                "would compute another function. Choose another model.decoder.preset, or set it"
            )


def _decoder_config(fields: Mapping[str, Any]) -> llama_model.LlamaConfig:
    if (kind := fields.get("model_type")) != "nextchat":
        raise errors.WeightsError(f"model_type is {kind!r}, not 'nextchat'")
    return llama.config_from_hf({**fields, "model_type": "llama"})


# ---- where training starts -------------------------------------------------------------------


def decoder_from_llama(
    tensors: convert.Tensors, cfg: llama_model.LlamaConfig, seed: int = 0
) -> dict[str, Any]:
    """A language model in any layout, its tables longer by the five added tokens.

    `<im_patch>` was added by itself and is normal with deviation 0.02, as any new row is; the other
    four have the mean of all rows before them, in both tables, as upstream adds them. A table may
    be longer than our vocabulary, as those padded to a multiple of 64 are; the rows behind it are
    left out.

    Args:
      tensors: of the language model.
      cfg: of our decoder, the added tokens counted.
      seed: of the random rows.
    """
    base = dataclasses.replace(
        cfg, vocab_size=cfg.vocab_size - network.NUM_ADDED, scan_layers=True, fused=False
    )
    params = llama.from_tensors(llama.first_tokens(tensors, base.vocab_size), base)
    rng = np.random.default_rng(seed)
    params["embed"]["table"] = extended(params["embed"]["table"], rng)
    if not cfg.tie_embeddings:
        kernel_dv = params["lm_head"]["kernel"]
        params["lm_head"]["kernel"] = np.ascontiguousarray(extended(kernel_dv.T, rng).T)
    return params


def extended(table_vd: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows, and five more: see `decoder_from_llama`."""
    patch_1d = (0.02 * rng.standard_normal((1, table_vd.shape[1]))).astype(table_vd.dtype)
    grown_vd = np.concatenate([table_vd, patch_1d])
    mean_1d = grown_vd.astype(np.float32).mean(axis=0, keepdims=True).astype(table_vd.dtype)
    others = np.repeat(mean_1d, network.NUM_ADDED - 1, axis=0)
    return np.concatenate([grown_vd, others])


def vision_from_clip(tensors: convert.Tensors, cfg: clip_model.VisionConfig) -> dict[str, Any]:
    """The tower of a CLIP file in any layout, rounded to float16."""
    params = functional.flatten(clip.vision_from_tensors(tensors, cfg))
    halves = {path: x.astype(np.float16).astype(x.dtype) for path, x in params.items()}
    return functional.unflatten(halves)
