"""Joins the processes of one job, where there are several."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax

from vlm_jax.machines import peers as peers_lib
from vlm_jax.machines import process_end
from vlm_jax.program import config as config_lib

# All are there already; who dies just now makes jax itself abort the others, without a message.
_CONNECT_TIMEOUT_S = 30
JOIN_TIMEOUT = "VLM_JAX_JOIN_TIMEOUT_S"  # environment: seconds for all processes to come


@contextlib.contextmanager
def job(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[peers_lib.Peers | None]:
    """Takes part in the job while the `with` block runs; None when this process is alone.

    With `coordinator`, the three values are used as they are. Without it, TPU pods, SLURM and MPI
    jobs of more than one task are found by their environment; a single machine is left alone.
    An error that leaves the block is told to the other processes, which end too. A block that ends
    well waits for the others' blocks to end well.

    Raises:
      ConfigError: values that do not go together.
      PeerMissing: processes that do not come.
    """
    address = _find(coordinator, num_processes, process_id)
    if address is None:
        yield None
        return
    try:
        peers = _join(*address)
    except peers_lib.JoinError as error:
        raise config_lib.ConfigError(str(error)) from error
    try:
        yield peers
    except BaseException as error:
        peers.fail(str(error) or type(error).__name__)
        raise
    peers.leave()
    jax.distributed.shutdown()
    peers.close()


def end(status: int, message: str = "") -> None:
    """Ends the program: by unwinding alone, at once when others would be waited for.

    At its exit jax waits for all processes, and some end because of this one.
    """
    if jax.distributed.is_initialized():
        process_end.end(status, message)
    if message:
        print(message, file=sys.stderr)
    sys.exit(status)


def _find(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int, Any] | None:
    """(host:port of process 0, number of processes, this one's, its devices) or None."""
    if coordinator:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise config_lib.ConfigError(f"--coordinator={coordinator} is not HOST:PORT")
        if num_processes is None or process_id is None:
            raise config_lib.ConfigError(
                f"--coordinator={coordinator} needs --num_processes and --process_id too"
            )
        if not 0 <= process_id < num_processes:
            raise config_lib.ConfigError(
                f"--process_id={process_id} is not in 0..{num_processes - 1}, as "
                f"--num_processes={num_processes} asks"
            )
        return coordinator, num_processes, process_id, None
    for name, value in (("num_processes", num_processes), ("process_id", process_id)):
        if value is not None:
            raise config_lib.ConfigError(f"--{name}={value} needs --coordinator=HOST:PORT too")
    if not (_several_tasks() or _on_tpu()):
        return None
    # What `jax.distributed.initialize` does without arguments; the address is needed before it.
    from jax._src import clusters

    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, _join_timeout_s()
    )
    return found if found[0] is not None and (found[1] or 1) > 1 else None


def _join(coordinator: str, num_processes: int, process_id: int, devices: Any) -> peers_lib.Peers:
    host, _, port = coordinator.rpartition(":")
    host, timeout_s = host.strip("[]"), _join_timeout_s()
    if process_id == 0:
        _start_hub(int(port), num_processes, timeout_s)
    peers = peers_lib.Peers(host, int(port), process_id, num_processes, timeout_s)
    # jax would take SIGTERM for itself; `stop_signal` hears it even while waiting.
    jax.config.update("jax_enable_preemption_service", False)
    with _service_elsewhere():
        jax.distributed.initialize(
            f"{coordinator.rpartition(':')[0]}:{peers.jax_port}",
            num_processes,
            process_id,
            local_device_ids=devices,
            initialization_timeout=_CONNECT_TIMEOUT_S,
        )
    return peers


def _start_hub(port: int, num_processes: int, timeout_s: float) -> None:
    try:
        if socket.has_dualstack_ipv6():
            listener = socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        else:
            listener = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise peers_lib.JoinError(
            f"port {port} of --coordinator cannot be used on this host ({error}): choose another"
        ) from error
    arguments = [listener.fileno(), num_processes, timeout_s]
    global _hub  # its stdin is a pipe that closes when this process ends, however it ends
    _hub = subprocess.Popen(
        [sys.executable, "-m", "vlm_jax.machines.peer_hub", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[listener.fileno()],
        start_new_session=True,  # Ctrl-C in a terminal is not for it
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    listener.close()


_hub: subprocess.Popen | None = None


@contextlib.contextmanager
def _service_elsewhere() -> Iterator[None]:
    """Keeps jax's process 0 from serving the coordination service, which the hub does."""
    from jax._src import distributed

    library, name = distributed._jax, "get_distributed_runtime_service"
    factory = getattr(library, name)
    setattr(library, name, lambda *args, **kwargs: types.SimpleNamespace(shutdown=lambda: None))
    try:
        yield
    finally:
        setattr(library, name, factory)


def _join_timeout_s() -> float:
    text = os.environ.get(JOIN_TIMEOUT) or "40"
    try:
        return float(text)
    except ValueError:
        raise config_lib.ConfigError(
            f"{JOIN_TIMEOUT}={text!r} is not a number of seconds"
        ) from None


def _several_tasks() -> bool:
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        text = os.environ.get(name) or "1"
        if not (text.isascii() and text.isdigit()):
            raise config_lib.ConfigError(
                f"{name}={text!r} in the environment is not a number of processes; unset it to run "
                "alone"
            )
        if int(text) > 1:
            return True
    return False


def _on_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
