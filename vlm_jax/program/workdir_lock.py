"""One run per work directory: `<workdir>/run.lock` says who it is.

The file is made by a hard link, which is atomic on network file systems too, and holds the host,
the process and when it started. Its owner touches it every few seconds. A lock whose process is
gone from this machine is stale at once; of another machine (or container) nothing is known but
that touch, so it is watched until it is touched again, or long enough to be sure.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from typing import Any

from vlm_jax.machines import process_end

FILE = "run.lock"
BEAT_S = 5.0  # between two touches
DEAD_S = 60.0  # without a touch: nobody's any more


class WorkdirInUse(RuntimeError):
    """Another run has this work directory; the message says which, and what can be done."""


class WorkdirLock:
    """Holds the work directory until `release`, or until this process ends in any way.

    Args:
      workdir: of the run; created when missing.

    Raises:
      WorkdirInUse: another run that may be alive holds it. Nothing was written.
      OSError: the folder cannot be written to.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / FILE
        self._text = json.dumps({**_this_process(), "lock": uuid.uuid4().hex}, indent=1)
        try:
            self._take(workdir)
        except OSError as error:
            problem = f"the workdir {workdir} cannot be written to ({error}); choose another"
            raise OSError(problem) from error
        self._released = threading.Event()
        self._forget = process_end.before(lambda status, message: self._remove_own())
        threading.Thread(target=self._beat, name="workdir-lock", daemon=True).start()

    def _take(self, workdir: pathlib.Path) -> None:
        self._made = not workdir.exists()
        workdir.mkdir(parents=True, exist_ok=True)
        while not _create(self._path, self._text):
            held = _read(self._path)
            if held is not None:
                _require_stale(self._path, held)
                _remove(self._path, held)
            elif self._path.is_symlink():  # to nowhere: neither a lock nor room for one
                raise OSError(f"{self._path} is a link to nowhere: remove it")

    def release(self) -> None:
        """Gives the folder free. May be called twice."""
        if not self._released.is_set():
            self._released.set()
            self._forget()
            self._remove_own()

    def __enter__(self) -> WorkdirLock:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.release()
        if kind and self._made:  # a start that failed leaves no folder, unless it holds something
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()

    def _remove_own(self) -> None:
        with contextlib.suppress(OSError):
            if _read(self._path) == self._text:
                self._path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a file system that is away for a while
                os.utime(self._path)
            if self._is_lost() and not self._released.wait(1.0) and self._is_lost():
                process_end.end(
                    process_end.USER_ERROR,
                    f"error: this run lost its lock {self._path}: it was removed, or another run "
                    "thought this one dead and took it. Stopped, so that only one run writes",
                )
                return

    def _is_lost(self) -> bool:
        try:
            return _read(self._path) != self._text
        except OSError:
            return False  # unknown


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _now(),
        "machine": _machine(),
        "process_start": _process_start(os.getpid()),
        "command": " ".join(sys.argv)[:1000],
    }


def _create(path: pathlib.Path, text: str) -> bool:
    """Makes the lock with its whole content at once; False if there is one."""
    own = path.with_name(f"{FILE}.{uuid.uuid4().hex}")
    own.write_text(text, encoding="utf-8")
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # no hard links here (FUSE, some network file systems)
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        own.unlink()
    return True


def _require_stale(path: pathlib.Path, text: str) -> None:
    """Returns when nobody holds this lock any more.

    Raises:
      WorkdirInUse: someone does.
    """
    try:
        owner = json.loads(text)
        owner = owner if isinstance(owner, dict) else {}
    except (ValueError, RecursionError):  # not a lock of ours, or one cut off: wait for a touch
        owner = {}
    alive = _is_alive(owner)
    if alive is None:
        alive = _is_touched(path, owner)
    if alive:
        raise WorkdirInUse(
            f"the workdir {path.parent} is in use by another run: {_describe(owner)}. Two runs in "
            "one workdir would destroy each other's checkpoints and metrics: wait until that one "
            f"has ended, stop it (kill {owner.get('pid')} on {owner.get('host')}), or choose "
            f"another --workdir. If it is certainly not running, remove {path}"
        )
    print(f"taking over {path.parent}: {_describe(owner)} is gone", file=sys.stderr)


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the process runs on this machine; None when it is another machine's."""
    if owner.get("machine") != _machine() or not isinstance(owner.get("pid"), int):
        return None
    start = _process_start(owner["pid"])
    return start is not None and start == owner.get("process_start")


def _is_touched(path: pathlib.Path, owner: dict[str, Any]) -> bool:
    """Watches the lock of another machine; all times are the file system's own."""
    seen = _touched_at(path)
    probe = path.with_name(f"{FILE}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        age_s = probe.stat().st_mtime - (seen or 0.0)
    finally:
        probe.unlink()
    if age_s > DEAD_S or seen is None:
        return False
    print(
        f"the workdir {path.parent} may be in use: {_describe(owner)}. Watching for up to "
        f"{DEAD_S - max(age_s, 0.0):.0f} s whether that run is alive",
        file=sys.stderr,
    )
    end_s = time.monotonic() + DEAD_S - max(age_s, 0.0)
    while time.monotonic() < end_s:
        time.sleep(1.0)
        if _touched_at(path) != seen:
            return True  # touched, or another start was quicker
    return False


def _touched_at(path: pathlib.Path) -> float | None:
    try:
        with open(path, "rb") as file:  # opening asks a network file system again
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _remove(path: pathlib.Path, text: str) -> None:
    """Removes a stale lock, unless another start has replaced it meanwhile."""
    aside = path.with_name(f"{FILE}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != text:  # the lock of a run that was quicker
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink()


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _describe(owner: dict[str, Any]) -> str:
    return (
        f"host {owner.get('host', 'unknown')}, process id {owner.get('pid', 'unknown')}, started "
        f"{owner.get('started', 'at an unknown time')}"
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


@functools.cache
def _machine() -> str:
    """What must agree for a process id to mean the same process: host, boot, container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """When a process of this machine started; "" when only that it runs is known; None if not."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except FileNotFoundError:
        if pathlib.Path("/proc/self/stat").exists():
            return None
    else:
        fields = stat.rpartition(")")[2].split()  # the name before may hold anything
        return None if fields[0] in "ZX" else fields[19]  # state; starttime, proc(5)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # someone else's
    return ""
