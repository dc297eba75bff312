"""LLaMA weights of other programs: Hugging Face, EasyLM (LVM's own format), GGUF and Meta.

    layer kernel        Hugging Face      EasyLM             GGUF, Meta        ours
    q, k                (n h, d)          (d, n h) pairs     (n h, d) pairs    (d, n, h)
    v                   (n h, d)          (d, n h)           (n h, d)          (d, n, h)
    o                   (d, n h)          (n h, d)           (d, n h)          (n, h, d)
    MLP                 (out, in)         (in, out)          (out, in)         (in, out)

"pairs": rotary embeddings there turn neighbouring channels (2i, 2i+1) of a head; Hugging Face and
we turn channels i and i + h/2. The converters reorder q and k, the model knows one layout only.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.weights import bounds, convert, errors, lazy, readers

# Tables of angles, one per channel pair, that some files store; computed here.
_INV_FREQ = r"(.*rotary_emb\.inv_freq|rope\.freqs)"
_BLOCK = re.compile(r"(?:^|[./])(?:layers|h|blk)[./](\d+)[./]")  # a layer's tensor, any layout


def _transposed(x, shape):
    return x.T.reshape(shape)


def _save_in_first(x):  # q, k, v, MLP: axis 0 is the input
    return x.reshape(x.shape[0], -1).T


def _save_out_last(x):  # o: the last axis is the output
    return x.reshape(-1, x.shape[-1]).T


def _pairs_to_halves(x, shape):
    d, n, h = shape
    return x.reshape(d, n, h // 2, 2).swapaxes(2, 3).reshape(shape)


def _halves_to_pairs(x):
    d, n, h = x.shape
    return x.reshape(d, n, 2, h // 2).swapaxes(2, 3).reshape(d, n * h)


def _table(
    names: Mapping[str, str], qk: tuple, in_first: tuple, out_last: tuple
) -> tuple[convert.Rule, ...]:
    """Every layout has the same twelve parameters; (load, save) pairs say how kernels differ."""
    return (
        convert.Rule("embed/table", names["embed"]),
        convert.Rule("layers/attn_norm/scale", names["attn_norm"]),
        convert.Rule("layers/attn/q/kernel", names["q"], *qk),
        convert.Rule("layers/attn/k/kernel", names["k"], *qk),
        convert.Rule("layers/attn/v/kernel", names["v"], *in_first),
        convert.Rule("layers/attn/o/kernel", names["o"], *out_last),
        convert.Rule("layers/mlp_norm/scale", names["mlp_norm"]),
        convert.Rule("layers/mlp/gate/kernel", names["gate"], *in_first),
        convert.Rule("layers/mlp/up/kernel", names["up"], *in_first),
        convert.Rule("layers/mlp/down/kernel", names["down"], *in_first),
        convert.Rule("final_norm/scale", names["final_norm"]),
        convert.Rule("lm_head/kernel", names["lm_head"], *in_first),
    )


# Matrices as torch stores them, (out, in); q and k with pairs of a rotation side by side.
_OUT_IN = dict(in_first=(_transposed, _save_in_first), out_last=(_transposed, _save_out_last))
_INTERLEAVED = (lambda x, shape: _pairs_to_halves(x.T, shape), lambda x: _halves_to_pairs(x).T)

_HF_LAYER = "model.layers.{layer}."
HF_RULES = _table(
    dict(
        embed="model.embed_tokens.weight",
        attn_norm=_HF_LAYER + "input_layernorm.weight",
        q=_HF_LAYER + "self_attn.q_proj.weight",
        k=_HF_LAYER + "self_attn.k_proj.weight",
        v=_HF_LAYER + "self_attn.v_proj.weight",
        o=_HF_LAYER + "self_attn.o_proj.weight",
        mlp_norm=_HF_LAYER + "post_attention_layernorm.weight",
        gate=_HF_LAYER + "mlp.gate_proj.weight",
        up=_HF_LAYER + "mlp.up_proj.weight",
        down=_HF_LAYER + "mlp.down_proj.weight",
        final_norm="model.norm.weight",
        lm_head="lm_head.weight",
    ),
    qk=_OUT_IN["in_first"],
    **_OUT_IN,
)

_EASYLM_LAYER = "transformer/h/{layer}/"
EASYLM_RULES = _table(
    dict(
        embed="transformer/wte/embedding",
        attn_norm=_EASYLM_LAYER + "attention_norm/kernel",
        q=_EASYLM_LAYER + "attention/wq/kernel",
        k=_EASYLM_LAYER + "attention/wk/kernel",
        v=_EASYLM_LAYER + "attention/wv/kernel",
        o=_EASYLM_LAYER + "attention/wo/kernel",
        mlp_norm=_EASYLM_LAYER + "ffn_norm/kernel",
        gate=_EASYLM_LAYER + "feed_forward/w1/kernel",
        up=_EASYLM_LAYER + "feed_forward/w3/kernel",
        down=_EASYLM_LAYER + "feed_forward/w2/kernel",
        final_norm="transformer/ln_f/kernel",
        lm_head="lm_head/kernel",
    ),
    qk=(_pairs_to_halves, _halves_to_pairs),
    in_first=(lambda x, shape: x.reshape(shape), lambda x: x.reshape(x.shape[0], -1)),
    out_last=(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1, x.shape[-1])),
)

_GGUF_LAYER = "blk.{layer}."
GGUF_RULES = _table(
    dict(
        embed="token_embd.weight",
        attn_norm=_GGUF_LAYER + "attn_norm.weight",
        q=_GGUF_LAYER + "attn_q.weight",
        k=_GGUF_LAYER + "attn_k.weight",
        v=_GGUF_LAYER + "attn_v.weight",
        o=_GGUF_LAYER + "attn_output.weight",
        mlp_norm=_GGUF_LAYER + "ffn_norm.weight",
        gate=_GGUF_LAYER + "ffn_gate.weight",
        up=_GGUF_LAYER + "ffn_up.weight",
        down=_GGUF_LAYER + "ffn_down.weight",
        final_norm="output_norm.weight",
        lm_head="output.weight",
    ),
    qk=_INTERLEAVED,
    **_OUT_IN,
)

_META_LAYER = "layers.{layer}."
META_RULES = _table(
    dict(
        embed="tok_embeddings.weight",
        attn_norm=_META_LAYER + "attention_norm.weight",
        q=_META_LAYER + "attention.wq.weight",
        k=_META_LAYER + "attention.wk.weight",
        v=_META_LAYER + "attention.wv.weight",
        o=_META_LAYER + "attention.wo.weight",
        mlp_norm=_META_LAYER + "ffn_norm.weight",
        gate=_META_LAYER + "feed_forward.w1.weight",
        up=_META_LAYER + "feed_forward.w3.weight",
        down=_META_LAYER + "feed_forward.w2.weight",
        final_norm="norm.weight",
        lm_head="output.weight",
    ),
    qk=_INTERLEAVED,
    **_OUT_IN,
)

PRESETS = llama.PRESETS
HF_STEM = "model"  # of the file names that transformers looks for
_RULES = {"hf": HF_RULES, "easylm": EASYLM_RULES, "gguf": GGUF_RULES, "meta": META_RULES}


# ---- parameters ------------------------------------------------------------------------------


def abstract_params(cfg: llama.LlamaConfig) -> Mapping[str, Any]:
    """The tree that the converters fill: stacked layers, whatever `cfg` says of decoding."""
    stacked = dataclasses.replace(cfg, scan_layers=True, fused=False)
    return functional.Functional(lambda rngs: llama.Llama(stacked, rngs)).abstract()


def from_hf(tensors: convert.Tensors, cfg: llama.LlamaConfig, shardings=None) -> dict[str, Any]:
    """`LlamaForCausalLM` tensors -> our parameters; see `convert.convert` for the errors."""
    return _convert(tensors, HF_RULES, cfg, shardings)


def from_easylm(tensors: convert.Tensors, cfg: llama.LlamaConfig, shardings=None) -> dict[str, Any]:
    """EasyLM tensors, of any of the four kinds, -> our parameters."""
    return _convert(_below_params(tensors), EASYLM_RULES, cfg, shardings)


def _below_params(tensors: convert.Tensors) -> convert.Tensors:
    """Drops `params/params/` (training state) or `params/` (variables) in front of every name."""
    for prefix in ("params/params/", "params/"):
        if any(name.startswith(prefix) for name in tensors):
            return tensors.renamed(operator.methodcaller("removeprefix", prefix))
    return tensors


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
    source, head = convert.source_of(tensors), _head_of(tensors, rules)
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


def _head_of(tensors: convert.Tensors, rules: tuple[convert.Rule, ...]) -> str:
    """The head of a file: "none", "tied" where it repeats the embedding, "own"; "" is unknown."""
    theirs = {rule.ours: rule.theirs for rule in rules}
    table, head = theirs.get("embed/table"), theirs.get("lm_head/kernel")
    if table not in tensors:
        return ""
    if head not in tensors:
        return "none"
    x, y = tensors[head], tensors[table]
    x = x.T if rules is EASYLM_RULES else x
    return "tied" if x.shape == y.shape and np.array_equal(x, y) else "own"


def ignorable(cfg: llama.LlamaConfig) -> tuple[str, ...]:
    """Patterns of the tensors that may be there and are not used."""
    optimizer = (r"step", r"opt_state/.*")  # of an EasyLM training state
    # Some writers store the tied head a second time.
    tied = (r"lm_head[./](weight|kernel)", r"output\.weight") if cfg.tie_embeddings else ()
    return (_INV_FREQ, *optimizer, *tied)


def to_hf(params: Mapping[str, Any], cfg: llama.LlamaConfig) -> dict[str, Callable]:
    """Our parameters -> Hugging Face name -> function returning the array."""
    del cfg  # the tree says it all; kept so that every system's function looks alike
    return convert.revert(params, HF_RULES)


def to_meta(params: Mapping[str, Any]) -> dict[str, Callable]:
    """Our parameters -> Meta's name -> function returning the array; a tied head is written out."""
    loaders = convert.revert(params, META_RULES)
    return {"output.weight": loaders["tok_embeddings.weight"], **loaders}


def first_blocks(tensors: convert.Tensors, depth: int) -> lazy.Tensors:
    """The tensors without the blocks from `depth` on; nothing is loaded. Any layout.

    Raises:
      WeightsError: depth below 1, or fewer blocks than that in the checkpoint.
    """
    native, blocks, kept = {}, set(), {}
    for name in tensors:
        kept[name] = functools.partial(tensors.__getitem__, name)
        if match := _BLOCK.search(name[:200]):
            blocks.add(int(match[1]))
            if int(match[1]) >= depth:
                del kept[name]
        elif "layers/" in name:  # ours: stacked
            native[name] = kept[name]
    found = len(blocks) or min((len(load()) for load in native.values()), default=0)
    if not 1 <= depth <= found:
        source = convert.source_of(tensors)
        raise errors.WeightsError(f"{source}: {depth} blocks asked for, {found} are there")
    for name, load in native.items():
        kept[name] = lambda load=load: load()[:depth]
    return lazy.Tensors(kept, convert.source_of(tensors), getattr(tensors, "metadata", None))


def first_tokens(tensors: convert.Tensors, count: int) -> lazy.Tensors:
    """The tensors without the table's and head's rows from `count` on: padding behind a vocabulary.

    Shorter tables stay as they are; nothing is loaded. Any layout.
    """
    layout = layout_of(tensors)
    rules = _RULES.get(layout, convert.NATIVE_RULES)
    theirs = {rule.ours: rule.theirs for rule in rules if isinstance(rule.theirs, str)}
    table, head = (theirs.get(path, path) for path in ("embed/table", "lm_head/kernel"))
    by_column = layout in ("easylm", "native")

    def cut(name):
        x = tensors[name]
        return x[:, :count] if by_column and name.endswith(head) else x[:count]

    loaders = {
        name: (lambda name=name: cut(name))
        if name.endswith((table, head))
        else lazy.item(tensors, name)
        for name in tensors
    }
    return lazy.Tensors(loaders, convert.source_of(tensors), getattr(tensors, "metadata", None))


# ---- whole checkpoints -----------------------------------------------------------------------

_LAYOUTS = {  # a name that only this layout has, wherever it stands -> how to read it
    "model.embed_tokens.weight": ("hf", from_hf),
    "transformer/wte/embedding": ("easylm", from_easylm),
    "token_embd.weight": ("gguf", from_gguf),
    "tok_embeddings.weight": ("meta", from_meta),
    "embed/table": ("native", from_native),
}


def layout_of(tensors: convert.Tensors) -> str:
    """One of "hf", "easylm", "gguf", "meta", "native"; WeightsError when the names tell nothing."""
    for sign, (layout, _) in _LAYOUTS.items():
        if any(name == sign or name.endswith("/" + sign) for name in tensors):
            return layout
    raise errors.WeightsError(
        f"{convert.source_of(tensors)}: not a LLaMA checkpoint: none of "
        f"{list(_LAYOUTS)} among its tensors {sorted(tensors)[:5]} ..."
    )


def from_tensors(tensors: convert.Tensors, cfg: llama.LlamaConfig, shardings=None):
    """Tensors in any of the five layouts -> our parameters."""
    layout = layout_of(tensors)
    read = next(read for name, read in _LAYOUTS.values() if name == layout)
    return read(tensors, cfg, shardings)


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
    if cfg.tie_embeddings and layout in _RULES:
        own = _below_params(tensors) if layout == "easylm" else tensors
        if _head_of(own, _RULES[layout]) == "own":
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
_STATED = {"num_heads": "num_heads", "num_kv_heads": "kv_heads", "head_width": "head_size",
           "rope_theta": "rope_theta", "rms_eps": "rms_eps"}  # fmt: skip


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


def config_from_hf(fields: Mapping[str, Any]) -> llama.LlamaConfig:
    """A transformers config.json -> our config. Variants that we do not compute are refused."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}  # v5, v4
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one for each kind of layer"
    wrong = {
        "model_type": fields.get("model_type", "llama") != "llama",
        "hidden_act": fields.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(fields.get("attention_bias")),
        "mlp_bias": bool(fields.get("mlp_bias")),
        "rope_scaling": kind != "default",
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
    }
    if any(wrong.values()):
        found = {key: fields.get(key, rope.get(key, kind)) for key, bad in wrong.items() if bad}
        raise errors.WeightsError(f"{found} is not supported; plain LLaMA is")
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size",
              "num_attention_heads")  # fmt: skip
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
        rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 1e4),
        rms_eps=_or(fields.get("rms_norm_eps"), 1e-6),
        max_tokens=_or(
            fields.get("max_position_embeddings"), _or(fields.get("max_sequence_length"), 2048)
        ),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
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
        rope_theta=float(fields.get("rope_theta") or 1e4),
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
    layout = layout_of(tensors)
    if layout not in _RULES:
        raise errors.WeightsError(
            f"{convert.source_of(tensors)}: the {layout} layout needs its config.json"
        )
    if layout == "easylm":
        tensors = _below_params(tensors)
    theirs = {rule.ours: rule.theirs for rule in _RULES[layout]}
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
    rotary = [name for name in tensors if re.fullmatch(_INV_FREQ, name)]
    if rotary:
        num_heads = q // (2 * tensors[rotary[0]].size)
    base = llama.LlamaConfig(**sizes, num_heads=num_heads or 1, head_width=2)
    if not num_heads:
        same = [p for p in llama.PRESETS.values()
                if (p.width, p.depth, p.mlp_width) == (width, depth, mlp_width)]  # fmt: skip
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
