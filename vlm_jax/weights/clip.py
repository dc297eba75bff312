"""CLIP weights in the layouts of OpenAI and of Hugging Face.

    ours                 OpenAI                          Hugging Face
    q, k, v [d, n, h]    in_proj_weight (3 n h, d)       q_proj.weight (n h, d), ...
    o       [n, h, d]    out_proj.weight (d, n h)        out_proj.weight (d, n h)
    MLP     (in, out)    c_fc, c_proj (out, in)          fc1, fc2 (out, in)
    patches (kh, kw, in, out)     conv1 (out, in, kh, kw)         patch_embedding, the same
    projections (in, out)         proj, text_projection (in, out)          (out, in)

OpenAI's files are TorchScript archives; `read` takes their tensors without running anything. Where
one tensor there is three here, the converter sees names with `#q`, `#k`, `#v` behind them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_jax.models import clip
from vlm_jax.nn import functional
from vlm_jax.weights import bounds, convert, errors, export, lazy, readers

_THIRDS = ("q", "k", "v")
_FUSED = re.compile(r".*\.attn\.in_proj_(weight|bias)")
_OF_THIRD = re.compile(r"(.*)#([qkv])")

_TRANSPOSED = (lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(x.shape[0], -1).T)
_OUT_LAST = (lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T)
_FLAT = (lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
_CONV = (lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def openai_blocks(ours: str, theirs: str) -> tuple[convert.Rule, ...]:
    """Rules of a stack of blocks; `ours` is a path and `theirs` a name in front."""
    block, name = rf"{ours}blocks/(\d+)/", theirs + r"resblocks.\1."
    return (
        *(
            rule
            for third in _THIRDS
            for rule in (
                convert.Rule(
                    block + f"attn/{third}/kernel",
                    f"{name}attn.in_proj_weight#{third}",
                    *_TRANSPOSED,
                ),
                convert.Rule(
                    block + f"attn/{third}/bias", f"{name}attn.in_proj_bias#{third}", *_FLAT
                ),
            )
        ),
        convert.Rule(block + "attn/o/kernel", name + "attn.out_proj.weight", *_OUT_LAST),
        convert.Rule(block + "attn/o/bias", name + "attn.out_proj.bias"),
        *_norm(block + "attn_norm", name + "ln_1"),
        *_norm(block + "mlp_norm", name + "ln_2"),
        convert.Rule(block + "mlp/up/kernel", name + "mlp.c_fc.weight", *_TRANSPOSED),
        convert.Rule(block + "mlp/up/bias", name + "mlp.c_fc.bias"),
        convert.Rule(block + "mlp/down/kernel", name + "mlp.c_proj.weight", *_TRANSPOSED),
        convert.Rule(block + "mlp/down/bias", name + "mlp.c_proj.bias"),
    )


def openai_vision(ours: str = "vision/", theirs: str = "visual.") -> tuple[convert.Rule, ...]:
    """Rules of an image tower without its projection."""
    return (
        convert.Rule(ours + "class_token", theirs + "class_embedding"),
        convert.Rule(ours + "positions", theirs + "positional_embedding"),
        convert.Rule(ours + "patches/kernel", theirs + "conv1.weight", *_CONV),
        *_norm(ours + "pre_norm", theirs + "ln_pre"),
        *openai_blocks(ours, theirs + "transformer."),
        *_norm(ours + "post_norm", theirs + "ln_post"),
    )


def _norm(ours: str, theirs: str) -> tuple[convert.Rule, ...]:
    return (
        convert.Rule(ours + "/scale", theirs + ".weight"),
        convert.Rule(ours + "/bias", theirs + ".bias"),
    )


OPENAI_RULES = (
    *openai_vision(),
    convert.Rule("vision/projection/kernel", "visual.proj"),
    convert.Rule("text/table", "token_embedding.weight"),
    convert.Rule("text/positions", "positional_embedding"),
    *openai_blocks("text/", "transformer."),
    *_norm("text/final_norm", "ln_final"),
    convert.Rule("text/projection/kernel", "text_projection"),
    convert.Rule("logit_scale", "logit_scale"),
)


def _hf_tower(ours: str, theirs: str) -> tuple[convert.Rule, ...]:
    block, name = rf"{ours}blocks/(\d+)/", theirs + r"encoder.layers.\1."
    return (
        convert.Rule(
            block + "attn/([qkv])/kernel", name + r"self_attn.\2_proj.weight", *_TRANSPOSED
        ),
        convert.Rule(block + "attn/([qkv])/bias", name + r"self_attn.\2_proj.bias", *_FLAT),
        convert.Rule(block + "attn/o/kernel", name + "self_attn.out_proj.weight", *_OUT_LAST),
        convert.Rule(block + "attn/o/bias", name + "self_attn.out_proj.bias"),
        *_norm(block + "attn_norm", name + "layer_norm1"),
        *_norm(block + "mlp_norm", name + "layer_norm2"),
        convert.Rule(block + "mlp/up/kernel", name + "mlp.fc1.weight", *_TRANSPOSED),
        convert.Rule(block + "mlp/up/bias", name + "mlp.fc1.bias"),
        convert.Rule(block + "mlp/down/kernel", name + "mlp.fc2.weight", *_TRANSPOSED),
        convert.Rule(block + "mlp/down/bias", name + "mlp.fc2.bias"),
    )


_HF_VISION = "vision_model.embeddings."
HF_RULES = (
    convert.Rule("vision/class_token", _HF_VISION + "class_embedding"),
    convert.Rule("vision/positions", _HF_VISION + "position_embedding.weight"),
    convert.Rule("vision/patches/kernel", _HF_VISION + "patch_embedding.weight", *_CONV),
    *_norm("vision/pre_norm", "vision_model.pre_layrnorm"),  # their spelling
    *_hf_tower("vision/", "vision_model."),
    *_norm("vision/post_norm", "vision_model.post_layernorm"),
    convert.Rule("vision/projection/kernel", "visual_projection.weight", *_TRANSPOSED),
    convert.Rule("text/table", "text_model.embeddings.token_embedding.weight"),
    convert.Rule("text/positions", "text_model.embeddings.position_embedding.weight"),
    *_hf_tower("text/", "text_model."),
    *_norm("text/final_norm", "text_model.final_layer_norm"),
    convert.Rule("text/projection/kernel", "text_projection.weight", *_TRANSPOSED),
    convert.Rule("logit_scale", "logit_scale"),
)

# Constants of OpenAI's archives, buffers of older Hugging Face files.
_BUFFERS = (
    r"input_resolution",
    r"context_length",
    r"vocab_size",
    r".*\.position_ids",
    r"(.*\.)?attn_mask",
)
_TEXT = (
    r"text_.*",
    r"token_embedding\..*",
    r"positional_embedding",
    r"transformer\..*",
    r"ln_final\..*",
    r"logit_scale",
)
_VISION = (r"visual\..*", r"vision_model\..*", r"visual_projection\..*", r"logit_scale")
_PROJECTION = (r"visual\.proj", r"visual_projection\..*")


def read(path: str | os.PathLike) -> lazy.Tensors:
    """`readers.read`, fused projections cut into three."""
    return cut(readers.read(path))


def cut(tensors: convert.Tensors, fused: re.Pattern = _FUSED) -> lazy.Tensors:
    """The same tensors, every fused one (`attn.in_proj_*`) as three: `...#q`, `...#k`, `...#v`."""

    def third(name, index):
        x = tensors[name]
        if x.shape[0] % 3:
            raise errors.WeightsError(f"{name} of shape {x.shape} is not three parts")
        return np.split(x, 3)[index]

    loaders: dict[str, Callable[[], np.ndarray]] = {}
    for name in tensors:
        if fused.fullmatch(name):
            loaders |= {
                f"{name}#{t}": functools.partial(third, name, i) for i, t in enumerate(_THIRDS)
            }
        else:
            loaders[name] = functools.partial(tensors.__getitem__, name)
    return lazy.Tensors(loaders, convert.source_of(tensors), getattr(tensors, "metadata", None))


def join(loaders: Mapping[str, Callable[[], np.ndarray]]) -> dict[str, Callable[[], np.ndarray]]:
    """Inverse of `cut`, on functions that return arrays."""

    def whole(name):
        return np.concatenate([loaders[f"{name}#{third}"]() for third in _THIRDS])

    joined: dict[str, Callable[[], np.ndarray]] = {}
    for name, load in loaders.items():
        match = _OF_THIRD.fullmatch(name)
        if match is None:
            joined[name] = load
        elif match[1] not in joined:
            joined[match[1]] = functools.partial(whole, match[1])
    return joined


def join_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of what `join` makes."""
    joined: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = _OF_THIRD.fullmatch(name)
        joined[match[1] if match else name] = (3 * shape[0], *shape[1:]) if match else shape
    return joined


# ---- parameters ------------------------------------------------------------------------------


def abstract_params(cfg: clip.ClipConfig) -> Mapping[str, Any]:
    """The tree that the converters fill."""
    return clip.make(cfg).abstract()


def from_tensors(tensors: convert.Tensors, cfg: clip.ClipConfig, shardings=None) -> dict[str, Any]:
    """Both towers from either layout; see `convert.convert` for the errors."""
    rules = _RULES[layout_of(tensors)]
    return convert.convert(_cut(tensors), rules, abstract_params(cfg), _BUFFERS, shardings)


def vision_from_tensors(tensors: convert.Tensors, cfg: clip.VisionConfig) -> dict[str, Any]:
    """The image tower alone; with `cfg.projection` 0 the checkpoint's projection is left out."""
    tower = functional.Functional(lambda rngs: clip.VisionTower(cfg, rngs)).abstract()
    ignore = (*_BUFFERS, *_TEXT, *(() if cfg.projection else _PROJECTION))
    rules = _RULES[layout_of(tensors)]
    return convert.convert(_cut(tensors), rules, {"vision": tower}, ignore)["vision"]


def text_from_tensors(tensors: convert.Tensors, cfg: clip.TextConfig) -> dict[str, Any]:
    """The text tower alone."""
    tower = functional.Functional(lambda rngs: clip.TextTower(cfg, rngs)).abstract()
    rules = _RULES[layout_of(tensors)]
    return convert.convert(_cut(tensors), rules, {"text": tower}, (*_BUFFERS, *_VISION))["text"]


def _cut(tensors: convert.Tensors) -> convert.Tensors:
    return cut(tensors) if any(_FUSED.fullmatch(name) for name in tensors) else tensors


def to_openai(params: Mapping[str, Any]) -> dict[str, Callable]:
    """Our parameters (both towers) -> OpenAI's name -> function returning the array."""
    return join(convert.revert(params, OPENAI_RULES))


def to_hf(params: Mapping[str, Any], cfg: clip.ClipConfig) -> dict[str, Callable]:
    """Our parameters (both towers) -> Hugging Face name -> function returning the array."""
    del cfg
    return convert.revert(params, HF_RULES)


def openai_checkpoint(params: Mapping[str, Any], dtype="float16") -> export.Checkpoint:
    """What `export.write_file` writes: OpenAI's names, as a state dict and not an archive."""
    shapes = join_shapes(convert.reverted_shapes(params, OPENAI_RULES))
    return export.Checkpoint(to_openai(params), shapes, np.dtype(dtype), "clip", {}, {})


def ignorable(cfg: clip.ClipConfig) -> tuple[str, ...]:
    """Patterns of the tensors that may be there and are not used."""
    del cfg
    return _BUFFERS


def config_to_hf(cfg: clip.ClipConfig) -> dict[str, Any]:
    """The config.json that transformers reads."""
    towers = {
        name: dict(
            hidden_size=tower.width,
            num_hidden_layers=tower.depth,
            num_attention_heads=tower.heads,
            intermediate_size=tower.hidden,
            hidden_act=tower.activation,
            layer_norm_eps=tower.norm_eps,
            projection_dim=tower.projection,
        )
        for name, tower in (("vision_config", cfg.vision), ("text_config", cfg.text))
    }
    towers["vision_config"] |= dict(
        model_type="clip_vision_model",
        image_size=cfg.vision.image_size,
        patch_size=cfg.vision.patch_size,
    )
    towers["text_config"] |= dict(
        model_type="clip_text_model",
        vocab_size=cfg.text.vocab_size,
        max_position_embeddings=cfg.text.max_tokens,
        # 2 is what transformers writes for "the largest id".
        eos_token_id=2 if cfg.text.end_id < 0 else cfg.text.end_id,
    )
    return dict(
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=cfg.vision.projection,
        **towers,
    )


PRESETS: Mapping[str, clip.ClipConfig] = {}  # shapes tell all but what config.json says
HF_STEM = "model"
_RULES = {"openai": OPENAI_RULES, "hf": HF_RULES, "native": convert.NATIVE_RULES}
_SIGNS = {
    "visual.class_embedding": "openai",
    "token_embedding.weight": "openai",
    _HF_VISION + "class_embedding": "hf",
    "text_model.final_layer_norm.weight": "hf",
    "vision/class_token": "native",
    "text/table": "native",
}


def layout_of(tensors: convert.Tensors) -> str:
    """One of "openai", "hf", "native"; WeightsError when the names tell nothing."""
    for sign, layout in _SIGNS.items():
        if sign in tensors:
            return layout
    raise errors.WeightsError(
        f"{convert.source_of(tensors)}: not a CLIP checkpoint: none of {list(_SIGNS)} among its "
        f"tensors {sorted(tensors)[:5]} ..."
    )


# ---- sizes -----------------------------------------------------------------------------------


def vision_config_of(tensors: convert.Tensors, path: str | os.PathLike = "") -> clip.VisionConfig:
    """Sizes of the image tower from the shapes; heads and activation as `_behaviour` says."""
    theirs = _names(layout_of(tensors), "vision")
    channels = tensors[theirs["patches"]].shape
    native = layout_of(tensors) == "native"
    width, patch = (channels[3], channels[0]) if native else (channels[0], channels[2])
    side = round((tensors[theirs["positions"]].shape[0] - 1) ** 0.5) * patch
    projection = tensors[theirs["projection"]].shape if theirs["projection"] in tensors else (0, 0)
    return bounds.make_config(
        clip.VisionConfig,
        width=width,
        depth=_depth(tensors, theirs["blocks"]),
        patch_size=patch,
        image_size=side,
        projection=projection[0] if layout_of(tensors) == "hf" else projection[1],
        **_behaviour(tensors, path, "vision_config"),
    )


def text_config_of(tensors: convert.Tensors, path: str | os.PathLike = "") -> clip.TextConfig:
    """Sizes of the text tower from the shapes; heads and activation as `_behaviour` says."""
    theirs = _names(layout_of(tensors), "text")
    vocab_size, width = tensors[theirs["table"]].shape
    projection = tensors[theirs["projection"]].shape
    return bounds.make_config(
        clip.TextConfig,
        width=width,
        depth=_depth(tensors, theirs["blocks"]),
        projection=projection[0] if layout_of(tensors) == "hf" else projection[1],
        vocab_size=vocab_size,
        max_tokens=tensors[theirs["positions"]].shape[0],
        **_behaviour(tensors, path, "text_config"),
    )


def config_of(tensors: convert.Tensors, path: str | os.PathLike = "") -> clip.ClipConfig:
    """Sizes of both towers."""
    return clip.ClipConfig(vision_config_of(tensors, path), text_config_of(tensors, path))


def load(
    path: str | os.PathLike, cfg: clip.ClipConfig | None = None
) -> tuple[clip.ClipConfig, dict[str, Any]]:
    """Both towers from a file or folder in any layout: (config, parameters)."""
    tensors = read(path)
    cfg = cfg or config_of(tensors, path)
    return cfg, from_tensors(tensors, cfg)


def load_vision(
    path: str | os.PathLike, cfg: clip.VisionConfig | None = None
) -> tuple[clip.VisionConfig, dict[str, Any]]:
    """The image tower: (config, parameters)."""
    tensors = read(path)
    cfg = cfg or vision_config_of(tensors, path)
    return cfg, vision_from_tensors(tensors, cfg)


def load_text(
    path: str | os.PathLike, cfg: clip.TextConfig | None = None
) -> tuple[clip.TextConfig, dict[str, Any]]:
    """The text tower: (config, parameters)."""
    tensors = read(path)
    cfg = cfg or text_config_of(tensors, path)
    return cfg, text_from_tensors(tensors, cfg)


def _names(layout: str, tower: str) -> dict[str, str]:
    """Their names of the tensors whose shapes tell the sizes."""
    wanted = {
        "vision": ("patches/kernel", "positions", "projection/kernel"),
        "text": ("table", "positions", "projection/kernel"),
    }[tower]
    found = {}
    for path in (*wanted, "blocks/0/attn_norm/scale"):
        for rule in _RULES[layout]:
            if match := re.fullmatch(rule.ours, f"{tower}/{path}"):
                found[path.split("/")[0]] = rule.name_of(match)
                break
    return found


def _depth(tensors: convert.Tensors, first: str) -> int:
    pattern = re.escape(first).replace("0", r"\d+", 1)
    return sum(re.fullmatch(pattern, name) is not None for name in tensors)


def require_stated(
    tensors: convert.Tensors, path: str | os.PathLike, cfg: clip.VisionConfig, section: str
) -> None:
    """Refuses an image tower whose config.json says another activation, heads, MLP or epsilon.

    Args: as of `weights.llama.require_stated`.

    Raises:
      WeightsError: see above.
    """
    found = _behaviour(tensors, path, "vision_config")
    model = dict(
        num_heads=cfg.heads, mlp_width=cfg.hidden, activation=cfg.activation, norm_eps=cfg.norm_eps
    )
    for name, value in found.items():
        if name in model and value != model[name]:
            raise errors.WeightsError(
                f"{path} was trained with {name}={value!r}, the model has {model[name]!r}: the "
                f"same weights would compute another function. Set {section}.{name}={value}"
            )


def _behaviour(tensors: convert.Tensors, path: str | os.PathLike, section: str) -> dict[str, Any]:
    """What shapes do not tell: OpenAI's choices, or a Hugging Face file's config.json."""
    file = readers.folder_of(path) / "config.json" if path else None
    if file is None or layout_of(tensors) != "hf" or not file.exists():
        return {}
    try:
        fields = bounds.read_json(file)
        fields = fields.get(section, fields)
        known = {
            "num_attention_heads": "num_heads",
            "intermediate_size": "mlp_width",
            "hidden_act": "activation",
            "layer_norm_eps": "norm_eps",
        }
        values = {ours: fields[key] for key, ours in known.items() if key in fields}
        if section == "text_config" and fields.get("eos_token_id", 2) != 2:
            # 2 is a mistake of early files; there the largest id is meant.
            values["end_id"] = fields["eos_token_id"]
        names = {field.name for field in dataclasses.fields(clip.TextConfig)}
        return {key: value for key, value in values.items() if key in names}
    except (ValueError, AttributeError, TypeError) as error:
        raise errors.WeightsError(f"{file}: {error}") from error
