"""Sizes and released weights of LVM: the language model is a plain LLaMA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.models import llama
from vlm_jax.program import config as config_lib
from vlm_jax.systems.lvm.task import LvmTask


def make_task(model: Mapping[str, Any], **task: Any) -> LvmTask:
    """The task from `config.model` (preset and fields of `LlamaConfig`) and `config.task`.

    Raises:
      ConfigError: unknown preset, unknown keys, sizes that do not fit each other.
    """
    cfg = config_lib.model_section(llama.LlamaConfig, llama.PRESETS, model)
    return config_lib.section(LvmTask, {"cfg": cfg, **task}, "task")


def load_upstream(path: str, task: LvmTask) -> dict[str, Any]:
    """Released, converted or shipped ("tiny") weights as parameters; see `weights.llama.load`.

    Raises:
      WeightsError: what cannot be used, or weights of a network that computes something else.
    """
    from vlm_jax.weights import llama as llama_weights
    from vlm_jax.weights import readers, shipped

    path = shipped.folder_of("lvm", path)
    llama_weights.require_stated(readers.read(path), path, task.cfg, "model")
    _, params = llama_weights.load(path, task.cfg)
    return params
