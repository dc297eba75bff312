"""Released weights that NExT-Chat reads; the page of them is `saving.released`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.saving import released


def _nextchat() -> Mapping[str, Any]:
    from vlm_jax.systems.nextchat import network

    return network.make(network.PRESETS["7b_336_masks"]).abstract()


def _clip() -> Mapping[str, Any]:
    from vlm_jax.models import clip

    return clip.make(clip.PRESETS["l14_336"]).abstract()


def _sam() -> Mapping[str, Any]:
    from vlm_jax.models import sam

    return sam.make(sam.PRESETS["vit_h"]).abstract()


NEXTCHAT = released.Released(
    "NExT-Chat 7B, 336 pixels",
    "AoZhang/nextchat-7b-336",
    "nextchat-7b-336",
    "nextchat",
    "15.5 GB computed from its shapes (two bytes a number)",
    released.UNKNOWN,
    "repository Apache-2.0; the language model derives from Vicuna 1.5, whose licence applies too",
    _nextchat,
    released.HF.format("AoZhang/nextchat-7b-336", "nextchat-7b-336"),
    "`python -m vlm_jax.tools.convert_weights --system=nextchat --from=nextchat-7b-336 --to=copy "
    "--format=upstream` uses every tensor or names it, and reports 7,741,813,044 parameters. A "
    "folder without a tower or SAM takes them from their own files: `--clip`, `--sam`.",
)
VICUNA = released.Released(
    "Vicuna 7B 1.5",
    "lmsys/vicuna-7b-v1.5",
    "(?i)vicuna-7b",
    "nextchat (training starts from it)",
    "13.5 GB computed from its shapes (float16)",
    released.UNKNOWN,
    "Llama 2 Community License",
    released.llama("lvm_7b", vocab_size=32_000),
    released.HF.format("lmsys/vicuna-7b-v1.5", "vicuna-7b-v1.5"),
    "With `--config.init.upstream=clip=clip-vit-large-patch14-336,llama=vicuna-7b-v1.5` its tables "
    "grow by five rows; projector, box encoder and box decoder are random.",
)
CLIP_336 = released.Released(
    "CLIP ViT-L/14, 336 pixels",
    "openai/clip-vit-large-patch14-336",
    r"ViT-L-14-336px|clip-vit-large-patch14-336",
    "nextchat (its tower)",
    released.UNKNOWN,
    released.UNKNOWN,
    "MIT",
    _clip,
    released.HF.format("openai/clip-vit-large-patch14-336", "clip-vit-large-patch14-336"),
    "Its tower has 303,507,456 parameters without the projection; they are rounded to float16, as "
    "NExT-Chat has them.",
)
SAM = released.Released(
    "SAM ViT-H",
    "facebook/sam-vit-huge, or Meta's own sam_vit_h_4b8939.pth",
    "sam_vit_h|sam-vit-huge",
    "nextchat (masks)",
    released.UNKNOWN,
    "4b8939, in the name of the file",
    "Apache-2.0",
    _sam,
    released.HF.format("facebook/sam-vit-huge", "sam-vit-huge"),
    '`vlm_jax.weights.sam.load("sam_vit_h_4b8939.pth")`: 641,090,864 parameters, the matrix of '
    "places counted.",
)

RELEASES = (NEXTCHAT, VICUNA, CLIP_336, SAM)
