"""The hub of a job of several processes: who is there, who failed, when all stop.

    python -m vlm_jax.machines.peer_hub FD NUM_PROCESSES JOIN_TIMEOUT_S       started by process 0

A process of its own, so that it outlives process 0: it serves jax's coordination service, and jax
aborts every process as soon as that vanishes, before the cause could be told. It listens on the
coordinator's port (FD is that socket, already bound) and gives jax another one.

Lines of JSON over TCP. From a process: `hello` once, then `error`, `stop`, `vote`, `done`. To all
processes: `join` (jax's port) when everyone has come, `failed` for the first failure, `stop` and
`stop_at` when one was asked to stop, `all_done`. A connection that closes before `done` is a
process that was killed; a host that is gone is noticed by TCP's own probes.
"""

from __future__ import annotations

import dataclasses
import json
import selectors
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

_MAX_LINE = 1 << 16  # bytes; who sends more is no process of ours
_LINGER_S = 60.0  # after a failure, for those that have not left yet
_SEND_TIMEOUT_S = 5.0


@dataclasses.dataclass
class _Peer:
    connection: socket.socket
    received: bytes = b""
    index: int | None = None  # None until it has said hello
    name: str = ""
    vote: int | None = None
    done: bool = False


class Hub:
    """Serves one job on the caller's thread; `serve` returns when everyone has left.

    Args:
      listener: a listening socket.
      num_processes: of the job.
      join_timeout_s: for all of them to say hello.
      start_service: starts jax's service for the job and returns its port.
      parent: file whose end means that process 0 is gone, or None.
    """

    def __init__(
        self,
        listener: socket.socket,
        num_processes: int,
        join_timeout_s: float,
        start_service: Callable[[], int],
        parent: Any = None,
    ):
        self._num_processes, self._join_timeout_s = num_processes, join_timeout_s
        self._start_service = start_service
        self._peers: list[_Peer] = []
        self._joined = self._asked_to_stop = self._has_parent = False
        self._failure: dict[str, Any] = {}  # the first, and
        self._ends_at_s: float | None = None  # when the hub ends because of it
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        if parent is not None:
            self._has_parent = True
            self._selector.register(parent, selectors.EVENT_READ, self._lose_parent)

    def serve(self) -> None:
        """Until all processes have left, or a while after one has failed."""
        started_s = time.monotonic()
        while self._peers or self._has_parent or not (self._joined or self._ends_at_s):
            for key, _ in self._selector.select(timeout=0.5):
                key.data(key.fileobj)
            now = time.monotonic()
            if not self._joined and now > started_s + self._join_timeout_s:
                self._fail_join()
            if self._ends_at_s and now > self._ends_at_s:
                return

    # ---- connections ------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(_SEND_TIMEOUT_S)
        keep_alive(connection)
        peer = _Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, lambda _: self._receive(peer))

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(_MAX_LINE)
        except OSError:  # a host that no longer answers, too
            data = b""
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            if peer in self._peers:
                self._read(peer, line)
        if not data or len(peer.received) > _MAX_LINE:
            self._lose(peer)

    def _read(self, peer: _Peer, line: bytes) -> None:
        try:
            message = json.loads(line)
            if (message["kind"] == "hello") != (peer.index is None):
                raise ValueError("hello comes once, and first")
            self._answer(peer, message)
        except (ValueError, TypeError, KeyError, RecursionError):
            self._lose(peer)  # someone else's connection

    def _answer(self, peer: _Peer, message: Mapping[str, Any]) -> None:
        kind = message["kind"]
        if kind == "hello":
            self._greet(peer, message)
        elif kind == "error":
            self._fail(peer.name, str(message["error"]), message.get("status"))
        elif kind == "done":
            peer.done = True
            members = self._members()
            if len(members) == self._num_processes and all(other.done for other in members):
                self._tell_all({"kind": "all_done"})
        elif kind == "stop" and not self._asked_to_stop:
            self._asked_to_stop = True
            self._tell_all({"kind": "stop"})
        elif kind == "vote":
            peer.vote = int(message["step"])
            votes = [other.vote for other in self._members()]
            if None not in votes:
                self._tell_all({"kind": "stop_at", "step": max(votes) + 1})

    def _lose(self, peer: _Peer) -> None:
        self._forget(peer)
        if peer.index is not None and not peer.done:
            self._fail(
                peer.name,
                "it ended without a word: killed (kill -9, out of memory, preempted), or its "
                "host is gone",
            )

    def _forget(self, peer: _Peer) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
            self._selector.unregister(peer.connection)
            peer.connection.close()

    def _lose_parent(self, parent: Any) -> None:
        self._selector.unregister(parent)
        self._has_parent = False
        if not self._joined:
            self._fail("process 0", "it ended before all processes were there")

    # ---- the job ----------------------------------------------------------------------------

    def _greet(self, peer: _Peer, hello: Mapping[str, Any]) -> None:
        index, of = hello.get("process"), hello.get("of")
        same = [other for other in self._members() if other.index == index]
        if self._joined or same or of != self._num_processes or index not in range(of):
            held = f"process {index} is {same[0].name}" if same else f"it has {len(self._peers)}"
            reason = (
                f"process {index} of {of} is not wanted by this job of {self._num_processes} "
                f"processes: {held if not self._joined else 'it runs already'}"
            )
            self._tell(peer, {"kind": "refused", "error": reason})
            self._forget(peer)
            return
        peer.index = index
        peer.name = f"process {index} (host {hello.get('host')}, process id {hello.get('pid')})"
        if self._failure:
            self._tell(peer, self._failure)
        elif len(self._members()) == self._num_processes:
            port = self._start_service()
            self._joined = True
            self._tell_all({"kind": "join", "port": port})

    def _members(self) -> list[_Peer]:
        return [peer for peer in self._peers if peer.index is not None]

    def _fail_join(self) -> None:
        came = {peer.index for peer in self._members()}
        missing = [str(i) for i in range(self._num_processes) if i not in came]
        some = ", ".join(missing[:8]) + (", ..." if missing[8:] else "")
        self._fail(
            f"process {some}" if len(missing) == 1 else f"{len(missing)} processes ({some})",
            f"did not come within {self._join_timeout_s:g} s, of {self._num_processes} in all; see "
            "what it says on its own host",
        )

    def _fail(self, name: str, error: str, status: int | None = None) -> None:
        if self._ends_at_s is None:  # what fails later fails because of the first
            self._ends_at_s = time.monotonic() + _LINGER_S
            self._failure = {"kind": "failed", "name": name, "error": error, "status": status}
            self._tell_all(self._failure)

    def _tell_all(self, message: Mapping[str, Any]) -> None:
        for peer in self._members():
            self._tell(peer, message)

    def _tell(self, peer: _Peer, message: Mapping[str, Any]) -> None:
        try:
            peer.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # it is gone; reading from it says so


def keep_alive(connection: socket.socket) -> None:
    """Has the kernel notice within half a minute that the other host does not answer any more."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    options = {
        "TCP_KEEPIDLE": 10,
        "TCP_KEEPINTVL": 5,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 30_000,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _start_jax_service(num_processes: int) -> Callable[[], int]:
    # Imported before anyone waits for it. jax offers no public way to serve without taking part.
    from jax._src.lib import _jax

    def start() -> int:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        start.service = _jax.get_distributed_runtime_service(f"[::]:{port}", num_processes)
        return port

    return start


def main(argv: list[str]) -> None:
    """See the module's docstring."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):  # a stop is the processes' affair
        signal.signal(number, signal.SIG_IGN)
    listener = socket.socket(fileno=int(argv[1]))
    start_service = _start_jax_service(int(argv[2]))
    Hub(listener, int(argv[2]), float(argv[3]), start_service, sys.stdin).serve()


if __name__ == "__main__":
    main(sys.argv)
