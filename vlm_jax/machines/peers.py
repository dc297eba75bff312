"""This process's place in a job of several: hears of failures, agrees on when to stop.

When another process fails (an error, `kill -9`, a host that is gone, one that never comes), this
one would wait in a collective for ever, or jax would abort it without a cause. Instead a thread
prints whose error it was and ends the process with status `process_end.PEER_FAILED`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any

from vlm_jax.machines import peer_hub, process_end

_FIRST_CAUSE_S = 2.0  # that another process failed first is known by then


class JoinError(ValueError):
    """This process cannot take part in the job; the message says why."""


class PeerMissing(RuntimeError):
    """Another process did not come, or failed before all were there; the message says which."""

    exit_status = process_end.PEER_FAILED


class Peers:
    """A connection to the hub of the job; see `peer_hub`.

    Args:
      host, port: of the hub.
      process_id: of this process, of `num_processes`.
      timeout_s: for the hub to answer; it waits itself for the other processes.

    Attributes:
      jax_port: where jax's coordination service listens, on the same host.

    Raises:
      PeerMissing: nobody answers there, or another process is missing or fails.
      JoinError: the hub does not want this one.
    """

    def __init__(self, host: str, port: int, process_id: int, num_processes: int, timeout_s: float):
        self._process_id = process_id
        self._step, self._stop_at = -1, None
        self._voting = threading.Lock()  # held from our vote until the step is agreed on
        self._all_done, self._leaving = threading.Event(), False
        self._socket = _connect(host, port, timeout_s)
        self._lines = self._socket.makefile("rb")
        self._send(
            "hello",
            process=process_id,
            of=num_processes,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self.jax_port = self._wait_for_all(host, port, timeout_s)
        threading.Thread(target=self._listen, name="peers", daemon=True).start()
        self._forget_last_words = process_end.before(self._tell)

    # ---- stopping together ------------------------------------------------------------------

    def ask_to_stop(self) -> None:
        """Asks all processes to stop at one step, soon. From any thread."""
        self._send("stop")

    def stops_at(self, step: int) -> bool:
        """Whether `step` is the agreed last one. Called after every step, on every process."""
        with self._voting:
            self._step = step
            return self._stop_at is not None and step >= self._stop_at

    # ---- ending -----------------------------------------------------------------------------

    def fail(self, error: str) -> None:
        """Tells the others that this process ends with an error; they end too.

        Does not return when another process failed first: then this error is its consequence.
        """
        time.sleep(_FIRST_CAUSE_S)
        self._tell(process_end.PEER_FAILED, error)

    def leave(self) -> None:
        """Waits until every process has come to its good end. May be called once."""
        self._send("done")
        self._all_done.wait()
        self._leaving = True
        self._forget_last_words()

    def close(self) -> None:
        """Closes the connection, after `leave`."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    # ---- the thread -------------------------------------------------------------------------

    def _wait_for_all(self, host: str, port: int, timeout_s: float) -> int:
        self._socket.settimeout(timeout_s + 30.0)  # the hub gives up earlier, and says why
        try:
            line = self._lines.readline()
        except OSError:
            line = b""
        self._socket.settimeout(None)
        if not line:
            raise PeerMissing(f"process 0 at {host}:{port} is gone; the others were waited for")
        message = json.loads(line)
        if message["kind"] == "join":
            return message["port"]
        if message["kind"] == "refused":
            raise JoinError(message["error"])
        raise PeerMissing(f"the job does not start: {message['name']}: {message['error']}")

    def _listen(self) -> None:
        while line := self._read_line():
            message = json.loads(line)
            if message["kind"] == "failed":
                self._end(message["name"], message["error"], message["status"])
            elif message["kind"] == "stop":
                self._voting.acquire()
                self._send("vote", step=self._step)
            elif message["kind"] == "stop_at":
                self._stop_at = message["step"]
                self._voting.release()
            elif message["kind"] == "all_done":
                self._all_done.set()
        self._end("process 0", "the hub that it started is gone (its host too?)", None)

    def _read_line(self) -> bytes:
        try:
            return self._lines.readline()
        except (OSError, ValueError):
            return b""

    def _end(self, name: str, error: str, status: int | None) -> None:
        if self._leaving:
            return
        self._leaving = True  # the others know already
        process_end.end(
            status or process_end.PEER_FAILED,
            f"error: {name} failed: {error}\n"
            f"Process {self._process_id} ends too; what was saved stays. Once the cause is "
            "mended, the same command on every process continues from the newest checkpoint.",
        )

    def _tell(self, status: int, error: str) -> None:
        if self._leaving:
            return
        self._leaving = True
        # A stop is passed on as a stop; errors are the others' errors only by way of this process.
        passed_on = status if status > process_end.SIGNAL else process_end.PEER_FAILED
        self._send("error", error=error.removeprefix("error: ")[:4000], status=passed_on)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def _send(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # the thread hears of a hub that is gone
            self._socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")


def _connect(host: str, port: int, timeout_s: float) -> socket.socket:
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5.0)
        except OSError as error:
            if time.monotonic() > end_s:
                raise PeerMissing(
                    f"process 0 does not answer at {host}:{port} within {timeout_s:g} s ({error}): "
                    "is it running, and is --coordinator the same on every process?"
                ) from None
            time.sleep(0.5)
        else:
            connection.settimeout(None)
            peer_hub.keep_alive(connection)
            return connection
