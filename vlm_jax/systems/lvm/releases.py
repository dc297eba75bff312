"""Released weights that LVM reads; the page of them is `saving.released`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.saving import released


def _vqgan() -> Mapping[str, Any]:
    from vlm_jax.models import vqgan
    from vlm_jax.weights import vqgan as vqgan_weights

    return vqgan_weights.abstract_params(vqgan.PRESETS["f16_8192"])


LVM = released.Released(
    "LVM 7B",
    "Emma02/LVM_ckpts",
    "LVM_ckpts",
    "lvm",
    "three safetensors shards, 4.99 + 4.92 + 3.17 GB (two bytes a number)",
    released.UNKNOWN,
    "repository Apache-2.0; that of the weights on their page",
    released.llama("lvm_7b"),
    released.HF.format("Emma02/LVM_ckpts", "LVM_ckpts"),
    '`load("lvm", "LVM_ckpts", tokenizer="vqvae_ckpts")` prints '
    "`Lvm(6.54B parameters, ..., context 4096, from LVM_ckpts)`; 6,544,199,680 parameters. Use the "
    "last revision: the files were uploaded anew in June 2024. No sample outputs are published.",
)
LVM_VQGAN = released.Released(
    "LVM's tokenizer (VQGAN f16, 8,192 codes)",
    "Emma02/vqvae_ckpts",
    "vqvae_ckpts|vqgan-f16-8192",
    "lvm, vqgan",
    "585 MB (float32)",
    released.UNKNOWN,
    "Apache-2.0, as openMUSE/vqgan-f16-8192-laion",
    _vqgan,
    released.HF.format("Emma02/vqvae_ckpts", "vqvae_ckpts"),
    '`load("vqgan", "vqvae_ckpts").encode(picture)`: 256 ids below 8,192 from a network of '
    "146,244,675 parameters, and `decode_u8` gives the picture back, recognisably. No sample "
    "outputs are published.",
)

RELEASES = (LVM, LVM_VQGAN)
