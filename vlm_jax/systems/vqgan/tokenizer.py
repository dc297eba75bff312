"""Trained tokenizers: loading by name or path, use from Python."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.models import vqgan
from vlm_jax.systems.vqgan.task import VqganTask
from vlm_jax.weights import errors, readers
from vlm_jax.weights import vqgan as vqgan_weights


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A trained network with its parameters: what `vlm_jax.load("vqgan", ...)` returns."""

    cfg: vqgan.VqganConfig
    params: Any

    def encode(self, image01: np.ndarray) -> np.ndarray:
        """float32[B, H, W, 3] in [0, 1] -> int32[B, T]; sides are multiples of the downsampling."""
        return np.asarray(self._functions[0](self.params, jnp.asarray(image01, jnp.float32)))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """int32[B, T], T a square -> float32[B, S, S, 3], clipped to [0, 1].

        Raises:
          ValueError: ids that are not in the codebook.
        """
        ids = np.asarray(ids, np.int32)
        if ids.size and not (0 <= ids.min() and ids.max() < self.cfg.num_embeddings):
            raise ValueError(
                f"ids {ids.min()}...{ids.max()} are not all in the codebook of "
                f"{self.cfg.num_embeddings}"
            )
        return np.clip(self._functions[1](self.params, ids), 0.0, 1.0)

    @functools.cached_property
    def _functions(self):
        network = vqgan.make(self.cfg)
        encode = jax.jit(lambda params, image01: network.bind(params).encode(image01))
        decode = jax.jit(lambda params, ids: network.bind(params).decode(ids))
        return encode, decode


def from_run(task: VqganTask, formatter: Any, params: Any) -> Tokenizer:
    """The tokenizer of a run of ours."""
    del formatter
    return Tokenizer(task.cfg, params)


def from_upstream(checkpoint: str) -> Tokenizer:
    """The tokenizer at `checkpoint`; see `load_tokenizer` for what that may be."""
    return Tokenizer(*load_tokenizer(checkpoint))


def load_tokenizer(
    name: str, *, num_embeddings: int = 0, tokens_per_image: int = 0
) -> tuple[vqgan.VqganConfig, Any]:
    """A tokenizer's config and parameters.

    Args:
      name: "tiny", which comes with the package; a folder in the released layout (config.json and
        pytorch_model.bin or .safetensors); or a folder that `tools.export_tokenizer` wrote.
      num_embeddings, tokens_per_image: what the user of the ids counts on; 0 accepts any. A
        language model paired with a tokenizer that it was not trained on runs and gives noise, so
        sizes are compared here.

    Returns:
      (config, parameters).

    Raises:
      ConversionError, WeightsError, FileNotFoundError: the weights are damaged, do not fit their
        config, or are not there.
      ValueError: another codebook or grid than asked for.
    """
    cfg, params = vqgan_weights.load(name)
    for what, has, wanted in (
        ("codes", cfg.num_embeddings, num_embeddings),
        ("ids per image", cfg.tokens_per_image, tokens_per_image),
    ):
        if wanted and has != wanted:
            raise ValueError(
                f"tokenizer {name!r} has {has} {what}, but {wanted} are needed; give the "
                f"tokenizer that the ids were made with"
            )
    return cfg, params


def load_upstream(path: str, task: VqganTask) -> Any:
    """Released weights as parameters of this task; see `weights.vqgan.load`.

    Raises:
      WeightsError: the codebook there has another size than the model here.
    """
    tensors = readers.read(path)
    try:
        found = vqgan_weights.config_of(tensors, path)
    except FileNotFoundError:
        found = task.cfg  # no config.json beside the weights; the shapes still have to fit
    for name in ("num_embeddings", "quantized_width", "channel_mult", "hidden_channels"):
        if getattr(found, name) != getattr(task.cfg, name):
            raise errors.WeightsError(
                f"{path} has {name}={getattr(found, name)}, the model {getattr(task.cfg, name)}"
            )
    return vqgan_weights.from_tensors(tensors, task.cfg)
