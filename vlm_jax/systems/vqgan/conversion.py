"""Conversions of the image tokenizer; see `weights.conversion`."""

from vlm_jax.models import vqgan as network
from vlm_jax.weights import conversion, vqgan

_NETWORK = conversion.Network("vqgan", vqgan)
FORMATS, read, write = _NETWORK.FORMATS, _NETWORK.read, _NETWORK.write
own_part = network.tokenizer_part  # a run may hold a discriminator and more besides
