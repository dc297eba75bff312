"""One run per work directory, on this machine and across machines."""

import json
import os
import subprocess
import sys
import time

import pytest

from vlm_jax.machines import process_end
from vlm_jax.program import workdir_lock


def owner(**changes):
    return {**workdir_lock._this_process(), **changes}


def write(workdir, text, age_s=0.0):
    path = workdir / workdir_lock.FILE
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Other machines are given up after a second instead of a minute."""
    monkeypatch.setattr(workdir_lock, "DEAD_S", 1.5)


def test_the_second_is_told_who_holds_it_and_touches_nothing(tmp_path):
    workdir = tmp_path / "run"
    with workdir_lock.WorkdirLock(workdir):
        before = {path: path.read_bytes() for path in workdir.iterdir()}
        with pytest.raises(workdir_lock.WorkdirInUse) as refused:
            workdir_lock.WorkdirLock(workdir)
        for word in (str(workdir), f"process id {os.getpid()}", "started 2", "another --workdir"):
            assert word in str(refused.value)
        assert {path: path.read_bytes() for path in workdir.iterdir()} == before
    assert not list(workdir.iterdir())
    workdir_lock.WorkdirLock(workdir).release()


def test_a_process_that_is_gone_holds_nothing(tmp_path, capsys):
    """Although its lock was touched just now."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write(tmp_path, owner(pid=gone.pid))
    with workdir_lock.WorkdirLock(tmp_path):
        assert f"process id {gone.pid}" in capsys.readouterr().err


def test_a_process_that_got_the_number_of_another_holds_nothing(tmp_path):
    write(tmp_path, owner(process_start="1"))
    workdir_lock.WorkdirLock(tmp_path).release()


@pytest.mark.parametrize("text", [owner(machine="elsewhere"), "", "{]", "[" * 10_000, "7"])
def test_a_lock_that_nobody_touches_any_more_is_taken_over(tmp_path, capsys, text):
    """Of another machine, or not a lock at all: nothing is known but when it was touched."""
    write(tmp_path, text, age_s=5.0)
    workdir_lock.WorkdirLock(tmp_path).release()
    write(tmp_path, text)  # touched just now, and then no more
    workdir_lock.WorkdirLock(tmp_path).release()
    assert capsys.readouterr().err.count("Watching for up to") == 1
    assert not list(tmp_path.iterdir())


def test_a_lock_that_another_machine_touches_is_held(tmp_path, monkeypatch):
    path = write(tmp_path, owner(machine="elsewhere", host="far", pid=7))
    text = path.read_text()
    monkeypatch.setattr(workdir_lock.time, "sleep", lambda s: os.utime(path, (0, 0)))
    with pytest.raises(workdir_lock.WorkdirInUse, match="host far, process id 7"):
        workdir_lock.WorkdirLock(tmp_path)
    assert path.read_text() == text


def test_the_quicker_of_two_that_take_over_keeps_it(tmp_path):
    path = write(tmp_path, "the quicker one's")
    workdir_lock._remove(path, "the stale one")
    assert path.read_text() == "the quicker one's"
    workdir_lock._remove(path, "the quicker one's")
    assert not list(tmp_path.iterdir())


def test_a_link_to_nowhere_in_its_place(tmp_path):
    (tmp_path / workdir_lock.FILE).symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="run.lock is a link to nowhere"):
        workdir_lock.WorkdirLock(tmp_path)


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with workdir_lock.WorkdirLock(tmp_path):
        with pytest.raises(workdir_lock.WorkdirInUse):
            workdir_lock.WorkdirLock(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_lost_its_lock_ends(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(workdir_lock, "BEAT_S", 0.02)
    monkeypatch.setattr(process_end, "end", lambda *args: ends.append(args))
    lock = workdir_lock.WorkdirLock(tmp_path)
    write(tmp_path, "another's")
    deadline = time.monotonic() + 30
    while not ends and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ends[0][0] == 2 and "lost its lock" in ends[0][1]
    lock.release()
    assert (tmp_path / workdir_lock.FILE).read_text() == "another's"
