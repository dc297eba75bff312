"""Trained tokenizers of this system: runs of our own and released weights."""

from __future__ import annotations

from typing import Any

from vlm_jax.encoders import image_tokenizer
from vlm_jax.models import vqgan
from vlm_jax.systems.vqgan.task import VqganTask
from vlm_jax.weights import errors, readers, shipped
from vlm_jax.weights import vqgan as vqgan_weights


def from_run(task: VqganTask, formatter: Any, params: Any) -> image_tokenizer.ImageTokenizer:
    """The tokenizer of a run of ours."""
    del formatter
    return image_tokenizer.ImageTokenizer(task.cfg, vqgan.tokenizer_part(params))


def from_upstream(checkpoint: str) -> image_tokenizer.ImageTokenizer:
    """ "tiny" (shipped), a released tokenizer, or a folder of `tools.export_run`."""
    return image_tokenizer.ImageTokenizer.load(checkpoint)


def load_upstream(path: str, task: VqganTask) -> Any:
    """Released weights, or "tiny" (shipped), as the tokenizer of this task.

    See `weights.vqgan.load`. Discriminator and usage of codes are not among them: name them in
    `init.random`.

    Raises:
      WeightsError: the codebook there has another size than the model here.
    """
    path = shipped.folder_of("vqgan", path)
    tensors = readers.read(path)
    try:
        found = vqgan_weights.config_beside(path)
    except FileNotFoundError:
        found = task.cfg  # no config.json beside the weights; the shapes still have to fit
    for name in (
        "num_embeddings",
        "quantized_width",
        "channel_mult",
        "hidden_channels",
        "norm_groups",
        "resample_with_conv",
    ):
        if getattr(found, name) != getattr(task.cfg, name):
            raise errors.WeightsError(
                f"{path} has {name}={getattr(found, name)}, the model {getattr(task.cfg, name)}"
            )
    return vqgan_weights.from_tensors(tensors, task.cfg)
