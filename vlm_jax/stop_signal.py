"""SIGTERM and Ctrl-C end a run between two steps, with a checkpoint."""

from __future__ import annotations

import signal
import threading

import jax


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a question asked between two steps.

    With `jax.distributed`, jax's own preemption service agrees on one step for all processes.
    """

    def __init__(self):
        self._flag = threading.Event()
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            if not jax.distributed.is_initialized():
                for number in (signal.SIGINT, signal.SIGTERM):
                    self._old[number] = signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self._flag.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice
        self._flag.set()

    def asked(self, step: int) -> bool:
        """Whether to save and stop now; the same answer on every process."""
        if jax.distributed.is_initialized():
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._flag.is_set()

    def restore(self):
        """Puts the former handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
