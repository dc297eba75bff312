"""Activations by name."""

from __future__ import annotations

import jax


def quick_gelu(x):
    """x * sigmoid(1.702 x), of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x):
    """x * Phi(x), by the error function."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x):
    """Its approximation by tanh, of T5 1.1 and GPT-2."""
    return jax.nn.gelu(x, approximate=True)


BY_NAME = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def check(name: str) -> None:
    """Raises ValueError unless there is one of this name."""
    if name not in BY_NAME:
        raise ValueError(f"activation {name!r} is none of {sorted(BY_NAME)}")
