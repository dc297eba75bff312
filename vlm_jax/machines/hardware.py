"""The devices of this machine, and the peak arithmetic and memory bandwidth of known ones.

Dense bfloat16, without sparsity, as the maker states them; what a program reaches is less. A TPU
generation whose chip shows up as two jax devices (v2, v3, 7x) has half a chip's figure here.
"""

import dataclasses
import os

import jax

from vlm_jax.program import config as config_lib


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak of one jax device: bfloat16 FLOP/s, and bytes per second of its memory."""

    flops: float
    bandwidth: float


# Keys are jax's device_kind. GPUs are matched by the longest key that the kind starts with, since
# their names go on with memory size and form factor.
PEAKS = {
    # TPU: cloud documentation, "TPU v3" ... "TPU7x" system architecture pages, per chip.
    "TPU v2": Peak(45e12 / 2, 700e9 / 2),
    "TPU v3": Peak(123e12 / 2, 900e9 / 2),
    "TPU v4": Peak(275e12, 1228e9),
    "TPU v5 lite": Peak(197e12, 819e9),
    "TPU v5e": Peak(197e12, 819e9),
    "TPU v5": Peak(459e12, 2765e9),
    "TPU v5p": Peak(459e12, 2765e9),
    "TPU v6 lite": Peak(918e12, 1640e9),
    "TPU v6e": Peak(918e12, 1640e9),
    "TPU7x": Peak(2307e12 / 2, 7380e9 / 2),
    # NVIDIA: product data sheets, the dense figure (half of the one "with sparsity").
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1555e9),
    "NVIDIA A100-PCIE-40GB": Peak(312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2039e9),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 1935e9),
    "NVIDIA L4": Peak(121e12, 300e9),
    "NVIDIA L40S": Peak(362e12, 864e9),
    "NVIDIA H100 PCIe": Peak(756e12, 2000e9),
    "NVIDIA H100 NVL": Peak(835e12, 3938e9),
    "NVIDIA H100 80GB": Peak(989e12, 3350e9),
    "NVIDIA H200": Peak(989e12, 4800e9),
    "NVIDIA H200 NVL": Peak(835e12, 4800e9),
    "NVIDIA B200": Peak(2250e12, 8000e9),
}


# Settings of jax under which this code, or the libraries below it, cannot work.
_IMPOSSIBLE = {
    "jax_numpy_dtype_promotion": ("strict",),
    "jax_numpy_rank_promotion": ("raise",),
    **dict.fromkeys(
        (
            "jax_transfer_guard",
            "jax_transfer_guard_host_to_device",
            "jax_transfer_guard_device_to_host",
            "jax_transfer_guard_device_to_device",
        ),
        ("disallow", "disallow_explicit"),
    ),
}


def require_devices() -> None:
    """Starts jax's backend.

    Raises:
      ConfigError: JAX_PLATFORMS asks for devices that are not there, the backend does not start, or
        a setting of jax forbids what every run does.
    """
    for name, values in _IMPOSSIBLE.items():
        value = getattr(jax.config, name, None)
        if value in values:
            raise config_lib.ConfigError(
                f"jax is set to {name}={value}, under which nothing here can run; unset "
                f"{name.upper()} in the environment"
            )
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter when the list ends up empty
        asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
        cause = (str(error).splitlines() or ["there is none of that kind"])[0]
        raise config_lib.ConfigError(
            f"jax finds no device: JAX_PLATFORMS={asked!r}: {cause}. Unset JAX_PLATFORMS to use "
            "what is there, set it to 'cpu', or install the jax of the device (pip install "
            "'vlm_jax[cuda]' or 'vlm_jax[tpu]')"
        ) from error


def peak(device) -> Peak | None:
    """Figures of a jax device, or None when its kind is not in the table (a CPU, say)."""
    kind = device.device_kind
    if kind in PEAKS:
        return PEAKS[kind]
    # A whole word must match: "NVIDIA L4" is not the beginning of "NVIDIA L40".
    prefixes = [key for key in PEAKS if key.startswith("NVIDIA") and kind.startswith(key + " ")]
    return PEAKS[max(prefixes, key=len)] if prefixes else None


def peak_flops(device) -> float | None:
    """Dense bfloat16 FLOP/s of a jax device, or None when unknown."""
    found = peak(device)
    return found.flops if found else None


def memory_bandwidth(device) -> float | None:
    """Bytes per second of a jax device's memory, or None when unknown."""
    found = peak(device)
    return found.bandwidth if found else None
