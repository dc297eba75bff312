"""What training frameworks and quantisers put around the weights of a network.

module.x, _orig_mod.x, model.model.x      prefixes of wrappers: dropped
x of fp8 with x_scale                     multiplied, as compressed-tensors and fbgemm do
lora_A, qweight, SCB, ...                 adapters and integer quantisation: explained
"""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np

from vlm_jax.weights import errors, lazy

_FP8 = tuple(
    np.dtype(getattr(ml_dtypes, name))
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
)

# torch.compile, FSDP and activation checkpointing wrap modules anywhere.
_INSIDE = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FRONT = ("module.", "_forward_module.", "base_model.model.")  # DDP, Lightning, peft
_LORA = re.compile(r"(^|.*\.)(lora_[A-Za-z_]+|modules_to_save)\..*")
_QUANTISED = re.compile(
    r".*\.(qweight|qzeros|g_idx|SCB|weight_format|weight_packed|weight\.(absmax|quant_\w+))(\..*)?"
)
_SCALE = re.compile(r"(.*)_scale(_inv)?")
_ACTIVATION = re.compile(r"(.*\.)(input|output)_scale")


def unwrapped(tensors: lazy.Tensors) -> lazy.Tensors:
    """The tensors under the network's own names, fp8 multiplied with its scales.

    Raises:
      WeightsError: an adapter that was not merged, or weights quantised to integers.
    """
    if lora := [name for name in tensors if _LORA.fullmatch(name)]:
        raise errors.WeightsError(
            f"{tensors.source} holds a LoRA adapter that is not merged ({lora[0]} and "
            f"{len(lora) - 1} more): merge it with peft (model.merge_and_unload()) and save the "
            "result"
        )
    if quantised := [name for name in tensors if _QUANTISED.fullmatch(name)]:
        raise errors.WeightsError(
            f"{tensors.source} is quantised to integers ({quantised[0]} and {len(quantised) - 1} "
            "more), which is not supported: take the unquantised weights, or dequantise them where "
            "they were made (transformers: model.dequantize())"
        )
    if any(_INSIDE.search(name) for name in tensors):
        tensors = tensors.renamed(lambda name: _INSIDE.sub("", name))
    while front := _front(tensors):
        tensors = tensors.renamed(lambda name, front=front: name.removeprefix(front))
    return _multiplied(tensors)


def _front(tensors: lazy.Tensors) -> str:
    """What a wrapper put in front of every name, or ""."""
    for front in _FRONT:
        if _all_begin(tensors, front):
            return front
    # A LightningModule with the network as `self.model`.
    twice = any(name.startswith(("model.model.", "model.module.")) for name in tensors)
    return "model." if twice and _all_begin(tensors, "model.") else ""


def _all_begin(tensors: lazy.Tensors, front: str) -> bool:
    return bool(tensors) and all(name.startswith(front) for name in tensors)


def _multiplied(tensors: lazy.Tensors) -> lazy.Tensors:
    """fp8 weights times their scales in float32; the scales are gone."""
    scales = {
        match[1]: name
        for name in tensors
        if (match := _SCALE.fullmatch(name)) and match[1] in tensors
    }
    if not scales:
        return tensors

    def load(name):
        weight, scale = tensors[name], tensors[scales[name]]
        rows = (len(weight),) if weight.ndim else ()
        per_row = scale.shape in (rows, (*rows, 1))
        if weight.dtype not in _FP8 or not (scale.size == 1 or per_row):
            raise errors.WeightsError(
                f"{tensors.source}: {name} is {weight.dtype}{weight.shape} with scales "
                f"{scales[name]} of {scale.shape}; only fp8 with one scale, or one per row, is "
                "supported. Dequantise it where it was made"
            )
        scale = scale.astype(np.float32).reshape(-1, *(1,) * (weight.ndim - 1))
        return (weight.astype(np.float32) * scale).reshape(weight.shape)

    used, loaders = set(scales.values()), {}
    for name in tensors:
        match = _ACTIVATION.fullmatch(name)
        # Scales of activations are for computing in fp8, which we do not.
        if name in used or (match and match[1] + "weight" in scales):
            continue
        loaders[name] = (
            (lambda name=name: load(name)) if name in scales else lazy.item(tensors, name)
        )
    return lazy.Tensors(loaders, tensors.source, tensors.metadata)
