"""Joins the processes of one job, where there are several."""

from __future__ import annotations

import glob
import importlib.util
import os

import jax


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """`jax.distributed.initialize`, when this is one process of several.

    With `coordinator`, the three values are used as they are. Without it, TPU pods, SLURM and MPI
    jobs of more than one task are found by their environment; a single machine is left alone.

    Raises:
      ValueError: a coordinator without the other two values.
    """
    if coordinator:
        if num_processes is None or process_id is None:
            raise ValueError(
                f"--coordinator={coordinator} needs --num_processes and --process_id too"
            )
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process_id={process_id} is not in 0..{num_processes - 1}")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif _several_tasks() or _on_tpu():
        jax.distributed.initialize()


def _several_tasks() -> bool:
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    return any(int(os.environ.get(name) or 1) > 1 for name in counts)


def _on_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
