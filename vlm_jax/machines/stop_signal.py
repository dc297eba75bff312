"""SIGTERM, SIGHUP, Ctrl-C: at once while nothing is to be saved, else after a step that is saved.

Handlers of Python run in the main thread between two bytecodes, which is too late when it compiles
for minutes or waits for another process. So a thread hears the signals too.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HANGUP = getattr(signal, "SIGHUP", None)  # the terminal is gone; Windows has none


class StopSignal:
    """Turns SIGTERM, SIGHUP (not under nohup), Ctrl-C into a question asked between two steps.

    Until `asked` is called for the first time (start-up, compilation of the update) there is
    nothing to save, and a signal ends the process. So does a second Ctrl-C.

    Args:
      leave: called with the signal's number, from another thread, to end the process; must not
        return. None raises KeyboardInterrupt in the main thread, as notebooks want it.
    """

    def __init__(self, leave: Callable[[int], None] | None = None):
        self._leave = leave
        self._peers: Any = None
        self._has_steps = False
        self._flag = threading.Event()
        self._old: dict[int, Any] = {}
        self._wakeup = self._old_wakeup = None
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._heeded():
            self._old[number] = signal.signal(number, self._hear)
        if leave:
            heard, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            self._old_wakeup = signal.set_wakeup_fd(
                self._wakeup.fileno(), warn_on_full_buffer=False
            )
            threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def join(self, peers: Any) -> None:
        """From now on the processes of a job agree on the step; see `peers.Peers`."""
        self._peers = peers

    def asked(self, step: int) -> bool:
        """Whether to save and stop now; the same answer on every process."""
        self._has_steps = True
        if self._peers:
            return self._peers.stops_at(step)
        return self._flag.is_set()

    def restore(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
        if self._wakeup:
            signal.set_wakeup_fd(self._old_wakeup)
            self._wakeup.close()
            self._wakeup = None

    @staticmethod
    def _heeded() -> tuple[int, ...]:
        if _HANGUP is None or signal.getsignal(_HANGUP) is signal.SIG_IGN:  # nohup
            return _SIGNALS
        return (*_SIGNALS, _HANGUP)

    def _ends_now(self, number: int) -> bool:
        return not self._has_steps or (self._flag.is_set() and number == signal.SIGINT)

    def _hear(self, number, frame):
        if self._leave is None:
            if self._ends_now(number):
                raise KeyboardInterrupt
            self._flag.set()

    def _listen(self, heard: socket.socket) -> None:
        with heard:
            while numbers := heard.recv(64):  # the interpreter writes one byte per signal
                for number in filter(self._old.__contains__, numbers):
                    if self._ends_now(number):
                        self._leave(number)
                    self._flag.set()
                    if self._peers:
                        self._peers.ask_to_stop()
