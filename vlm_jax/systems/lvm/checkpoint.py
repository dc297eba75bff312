"""An `Lvm` out of a run of our own, or out of released weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from vlm_jax import saving
from vlm_jax.encoders import image_tokenizer
from vlm_jax.machines import memory
from vlm_jax.models import llama
from vlm_jax.systems.lvm import model


def from_run(
    task: Any,
    formatter: Any,
    params: Any,
    *,
    tokenizer: str = "",
    context_images: int = 0,
    dtype: str = "",
) -> model.Lvm:
    """An Lvm from a run of our own; `vlm_jax.load` calls it.

    Args:
      task, formatter: as the run was configured.
      params: of its newest good checkpoint.
      tokenizer: "tiny" or a folder; "" takes what the run was configured with.
      context_images: images that a sequence holds; 0 takes what the run was trained with.
      dtype: compute dtype; "" is bfloat16 on an accelerator, float32 on a CPU.

    Raises:
      ValueError: no tokenizer is known, or it does not fit the language model.
    """
    name = tokenizer or task.tokenizer
    if not name:
        raise ValueError("the run names no tokenizer; give tokenizer=FOLDER")
    vqgan = image_tokenizer.ImageTokenizer.load(
        name,
        side=task.image_side,
        codebook_size=task.codebook_size,
        tokens_per_image=task.tokens_per_image,
    )
    return model.Lvm(
        dataclasses.replace(task.cfg, dtype=dtype or _default_dtype()),
        params,
        vqgan,
        context_images=context_images or task.context_images + 1,
        # What a row begins with: BOS, in the usual field list.
        lead_ids=formatter.encode({"tokens": b""})[0][: task.lead_tokens],
        sections={"task": saving.section_of(task), "formatter": saving.section_of(formatter)},
    )


def from_upstream(
    checkpoint: str,
    *,
    tokenizer: str = "",
    context_images: int = 16,
    dtype: str = "",
    preset: str = "",
) -> model.Lvm:
    """An Lvm from released weights; `vlm_jax.load` calls it.

    Args:
      checkpoint: anything `weights.readers.read` takes: a folder of safetensors shards,
        `params::FILE`, ...
      tokenizer: folder with the VQGAN: config.json and pytorch_model.bin or .safetensors.
      context_images, dtype: as in `from_run`.
      preset: sizes of weights that come without a config.json, for example "lvm_7b".

    Raises:
      FileNotFoundError, ConversionError: the weights cannot be read.
      ValueError: no tokenizer is given, or it does not fit the language model.
    """
    from vlm_jax.weights import llama as llama_weights
    from vlm_jax.weights import readers

    tensors = readers.read(checkpoint)
    if not tokenizer:
        raise ValueError(
            f"{checkpoint} holds no tokenizer; give tokenizer=FOLDER with the released VQGAN "
            f"(config.json and pytorch_model.bin or .safetensors)"
        )
    if preset and preset not in llama.PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(llama.PRESETS)}")
    num_codes = image_tokenizer.checked_config(tokenizer).num_embeddings
    cfg = llama.PRESETS[preset] if preset else llama_weights.config_of(tensors, checkpoint)
    if num_codes > cfg.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer!r} has {num_codes} codes, the language model "
            f"only {cfg.vocab_size} ids; give the tokenizer that it was trained with"
        )
    vqgan = image_tokenizer.ImageTokenizer.load(tokenizer)
    dtype = dtype or _default_dtype()
    held = llama_weights.abstract_params(dataclasses.replace(cfg, param_dtype=dtype))
    memory.require_for_loading(checkpoint, held, copy_dtype=copy_dtype(dtype))
    # Stored as computed: 7B in float32 would take 26 GB for nothing.
    cfg, params = llama_weights.load(checkpoint, cfg, dtype=dtype, param_dtype=dtype)
    return model.Lvm(cfg, params, vqgan, context_images=context_images)


def copy_dtype(dtype: str = "") -> str:
    """Of the copy that computes, for a `dtype` as above."""
    return llama.decode_dtype(dtype or _default_dtype())


def _default_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
