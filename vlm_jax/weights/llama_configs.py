"""Sizes of a LLaMA as other programs write them: Hugging Face, Meta, GGUF, or the shapes alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.models import llama
from vlm_jax.weights import bounds, convert, errors, llama_layouts


def config_from_hf(fields: Mapping[str, Any]) -> llama.LlamaConfig:
    """A transformers config.json -> our config. Variants that we do not compute are refused."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}  # v5, v4
    if not isinstance(rope, dict):
        raise errors.WeightsError(f"rope_scaling is {rope!r:.40}, not an object")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one for each kind of layer"
    wrong = {
        "model_type": fields.get("model_type", "llama") != "llama",
        "hidden_act": fields.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(fields.get("attention_bias")),
        "mlp_bias": bool(fields.get("mlp_bias")),
        "rope_scaling": kind != "default",
        "partial_rotary_factor": (fields | rope).get("partial_rotary_factor", 1) != 1,
    }
    if any(wrong.values()):
        found = {key: fields.get(key, rope.get(key, kind)) for key, bad in wrong.items() if bad}
        raise errors.WeightsError(f"{found} is not supported; plain LLaMA is")
    needed = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
    )
    if absent := [key for key in needed if key not in fields]:
        raise errors.WeightsError(f"{absent} missing; not a LLaMA config")
    cfg = bounds.make_config(
        llama.LlamaConfig,
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        depth=fields["num_hidden_layers"],
        mlp_width=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields.get("num_key_value_heads") or 0,
        head_width=fields.get("head_dim") or 0,
        # Absent keys mean what transformers' LlamaConfig means by them.
        rope_theta=_or(rope.get("rope_theta"), _or(fields.get("rope_theta"), 1e4)),
        rms_eps=_or(fields.get("rms_norm_eps"), 1e-6),
        max_tokens=_or(
            fields.get("max_position_embeddings"), _or(fields.get("max_sequence_length"), 2048)
        ),
        tie_embeddings=_or(fields.get("tie_word_embeddings"), False),
    )
    return _normal(cfg)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def config_to_hf(cfg: llama.LlamaConfig) -> dict[str, Any]:
    """The config.json that transformers reads. No bos or eos: ids 1 and 2 are image codes."""
    return dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        intermediate_size=cfg.mlp_width,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_size,
        rope_theta=cfg.rope_theta,
        rms_norm_eps=cfg.rms_eps,
        max_position_embeddings=cfg.max_tokens,
        tie_word_embeddings=cfg.tie_embeddings,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        # Spelled out, since transformers' defaults are 1 and 2.
        bos_token_id=None,
        eos_token_id=None,
    )


def config_from_meta(fields: Mapping[str, Any], vocab_size: int) -> llama.LlamaConfig:
    """Meta's params.json -> our config.

    The MLP width is not in the file but follows from it: two thirds of 4 * width, times the
    multiplier if there is one, up to the next multiple of `multiple_of`.

    Args:
      fields: the dict of the file.
      vocab_size: rows of the embedding; the file says -1 (LLaMA 1 and 2).

    Raises:
      WeightsError: sizes missing, or scaled rotary angles (LLaMA 3.1), which are not supported.
    """
    if fields.get("use_scaled_rope"):
        raise errors.WeightsError("use_scaled_rope is not supported; plain LLaMA is")
    if absent := [key for key in ("dim", "n_layers", "n_heads") if key not in fields]:
        raise errors.WeightsError(f"{absent} missing; not a params.json of LLaMA")
    multiple = fields.get("multiple_of", 256)
    hidden = int(8 * fields["dim"] / 3)
    hidden = int((fields.get("ffn_dim_multiplier") or 1) * hidden)
    cfg = bounds.make_config(
        llama.LlamaConfig,
        vocab_size=vocab_size,
        width=fields["dim"],
        depth=fields["n_layers"],
        mlp_width=-(-hidden // multiple) * multiple,
        num_heads=fields["n_heads"],
        num_kv_heads=fields.get("n_kv_heads") or 0,
        rope_theta=_or(fields.get("rope_theta"), 1e4),
        rms_eps=fields.get("norm_eps", 1e-5),
    )
    return _normal(cfg)


def config_from_gguf(metadata: Mapping[str, Any], *, tied: bool) -> llama.LlamaConfig:
    """GGUF metadata -> our config."""
    kind = metadata.get("general.architecture")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if kind != "llama" or scaling != "none":
        raise errors.WeightsError(
            f"GGUF architecture {kind!r}, rope scaling {scaling!r}; need llama, none"
        )
    get = {key.removeprefix("llama."): value for key, value in metadata.items()}
    width, heads = get["embedding_length"], get["attention.head_count"]
    head_width = get.get("attention.key_length", width // heads)
    if get.get("rope.dimension_count", head_width) != head_width:
        raise errors.WeightsError(
            f"GGUF: rotary over {get['rope.dimension_count']} of {head_width} channels per head; "
            "only all of them are supported"
        )
    cfg = bounds.make_config(
        llama.LlamaConfig,
        vocab_size=get.get("vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
        width=width,
        depth=get["block_count"],
        mlp_width=get["feed_forward_length"],
        num_heads=heads,
        num_kv_heads=get.get("attention.head_count_kv", heads),
        head_width=head_width,
        rope_theta=get.get("rope.freq_base", 1e4),
        rms_eps=_short(get["attention.layer_norm_rms_epsilon"]),
        max_tokens=get["context_length"],
        tie_embeddings=tied,
    )
    return _normal(cfg)


def _short(value: float) -> float:
    """1e-5 went through float32 in the file: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def config_from_shapes(tensors: convert.Tensors, num_heads: int = 0) -> llama.LlamaConfig:
    """Sizes from the shapes of a checkpoint that has no config.json.

    The number of heads leaves no trace in the shapes: it comes from the caller, from a stored
    rotary table, or from a preset of the same width, depth and MLP width. What leaves no trace
    either (rotary base, epsilon, context) is the preset's, or LlamaConfig's default.
    """
    layout = llama_layouts.layout_of(tensors)
    if layout not in llama_layouts.RULES:
        raise errors.WeightsError(
            f"{convert.source_of(tensors)}: the {layout} layout needs its config.json"
        )
    if layout == "easylm":
        tensors = llama_layouts.below_params(tensors)
    theirs = {rule.ours: rule.theirs for rule in llama_layouts.RULES[layout]}
    norms = re.escape(theirs["layers/attn_norm/scale"]).replace(r"\{layer\}", r"\d+")
    depth = sum(re.fullmatch(norms, name) is not None for name in tensors)
    vocab_size, width = tensors[theirs["embed/table"]].shape
    try:
        q, k, mlp_width = (
            tensors[theirs[f"layers/{part}/kernel"].replace("{layer}", "0")].size // width
            for part in ("attn/q", "attn/k", "mlp/gate")
        )
    except KeyError as error:
        raise errors.WeightsError(
            f"{convert.source_of(tensors)}: no tensor {error} to take the sizes from"
        ) from error
    sizes = dict(vocab_size=vocab_size, width=width, depth=depth, mlp_width=mlp_width)
    tied = theirs["lm_head/kernel"] not in tensors
    rotary = [name for name in tensors if re.fullmatch(llama_layouts.INV_FREQ, name)]
    if rotary:
        num_heads = q // (2 * tensors[rotary[0]].size)
    base = llama.LlamaConfig(**sizes, num_heads=num_heads or 1, head_width=2)
    if not num_heads:
        same = [
            p
            for p in llama.PRESETS.values()
            if (p.width, p.depth, p.mlp_width) == (width, depth, mlp_width)
        ]
        if not same:
            raise errors.WeightsError(
                f"{convert.source_of(tensors)}: width {width}, depth {depth}, MLP {mlp_width} fit "
                "no preset, and shapes do not tell the number of heads; put a config.json beside it"
            )
        base, num_heads = same[0], same[0].num_heads
    return _normal(
        dataclasses.replace(
            base,
            **sizes,
            num_heads=num_heads,
            num_kv_heads=k * num_heads // q,
            head_width=q // num_heads,
            tie_embeddings=tied,
        )
    )


def _normal(cfg: llama.LlamaConfig) -> llama.LlamaConfig:
    """0 where a field says what 0 means, so that equal networks have equal configs."""
    return dataclasses.replace(
        cfg,
        num_kv_heads=0 if cfg.num_kv_heads == cfg.num_heads else cfg.num_kv_heads,
        head_width=0 if cfg.head_width * cfg.num_heads == cfg.width else cfg.head_width,
    )
