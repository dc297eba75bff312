"""Conversions of LVM's language model; see `weights.conversion`."""

from vlm_jax.weights import conversion, llama

_NETWORK = conversion.Network("lvm", llama)
FORMATS, read, write = _NETWORK.FORMATS, _NETWORK.read, _NETWORK.write
