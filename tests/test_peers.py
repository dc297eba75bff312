"""Processes of a job hear of each other's failures; here they are threads around one hub."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest

from vlm_jax.machines import distributed, peer_hub, peers, process_end, stop_signal


class Job:
    """A hub on a thread, and whatever joins it."""

    def __init__(self, num_processes, join_timeout_s=20.0, parent=None):
        listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.num_processes = listener.getsockname()[1], num_processes
        hub = peer_hub.Hub(listener, num_processes, join_timeout_s, lambda: 4242, parent)
        self.hub = threading.Thread(target=hub.serve, daemon=True)
        self.hub.start()

    def join(self, *indices):
        """Peers of these numbers, joined at the same time; errors take the place of a peer."""
        found = {}

        def connect(index):
            try:
                found[index] = peers.Peers(
                    "127.0.0.1", self.port, index, self.num_processes, timeout_s=10.0
                )
            except (peers.JoinError, peers.PeerMissing) as error:
                found[index] = error

        threads = [threading.Thread(target=connect, args=(index,)) for index in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[index] for index in indices]


@pytest.fixture
def ends(monkeypatch):
    """What `process_end.end` was called with, instead of ending."""
    calls = []
    monkeypatch.setattr(process_end, "end", lambda *args: calls.append(args))
    monkeypatch.setattr(peers, "_FIRST_CAUSE_S", 0.0)
    return calls


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_all_come_and_leave(ends):
    job = Job(3)
    joined = job.join(0, 1, 2)
    assert [one.jax_port for one in joined] == [4242] * 3
    threads = [threading.Thread(target=one.leave) for one in joined]
    for thread in threads[:2]:
        thread.start()
    threads[0].join(0.2)
    assert threads[0].is_alive()  # waits for the last one's good end
    threads[2].start()
    for thread in threads:
        thread.join(30)
    for one in joined:
        one.close()
    job.hub.join(30)
    assert not job.hub.is_alive() and not ends


def test_an_error_is_told_to_the_others(ends):
    first, second = Job(2).join(0, 1)
    second.fail("no such file: x.jsonl")
    wait_for(lambda: ends)
    (status, message), *others = ends
    assert status == process_end.PEER_FAILED and not others
    assert "process 1 (host" in message and "failed: no such file: x.jsonl" in message


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named(ends, killed):
    job = Job(2)
    pair = job.join(0, 1)
    pair[killed]._leaving = True  # it is dead and says nothing
    pair[killed].close()
    wait_for(lambda: ends)
    assert f"process {killed} (host" in ends[0][1] and "killed" in ends[0][1]


def test_a_process_killed_while_others_wait_at_the_end_is_named(ends):
    first, second = Job(2).join(0, 1)
    threading.Thread(target=first.leave, daemon=True).start()
    second._leaving = True
    second.close()
    wait_for(lambda: ends)
    assert "process 1 (host" in ends[0][1]


def test_one_that_never_comes(ends):
    (error,) = Job(3, join_timeout_s=0.1).join(1)
    assert isinstance(error, peers.PeerMissing) and error.exit_status == process_end.PEER_FAILED
    assert "2 processes (0, 2): did not come within 0.1 s, of 3 in all" in str(error)


def test_the_first_process_ends_before_all_are_there(ends):
    reads, writes = socket.socketpair()
    job, found = Job(2, parent=reads), []
    waiting = threading.Thread(target=lambda: found.extend(job.join(1)))
    waiting.start()
    time.sleep(0.2)
    writes.close()
    waiting.join(30)
    assert isinstance(found[0], peers.PeerMissing)
    assert "process 0: it ended before all processes were there" in str(found[0])


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(peers.PeerMissing, match=f"does not answer at 127.0.0.1:{port}"):
        peers.Peers("127.0.0.1", port, 1, 2, timeout_s=0.1)


def test_two_of_the_same_number_and_another_size(ends):
    job = Job(2)
    errors = []

    def come_wrongly(index, num_processes):
        try:
            peers.Peers("127.0.0.1", job.port, index, num_processes, timeout_s=10.0)
        except peers.JoinError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=job.join, args=(0,), daemon=True)
    waiting.start()
    come_wrongly(1, 3)
    assert "process 1 of 3 is not wanted by this job of 2 processes" in errors[0]
    job.join(1)
    waiting.join(30)
    come_wrongly(1, 2)
    assert "it runs already" in errors[1]
    assert not ends


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 70_000, b"[" * 50_000 + b"\n", b"{}\n", b""]
)
def test_strangers_are_sent_away(ends, noise):
    job = Job(2)
    with socket.create_connection(("127.0.0.1", job.port)) as stranger:
        with contextlib.suppress(OSError):
            stranger.sendall(noise)
        pair = job.join(0, 1)
        assert [one.jax_port for one in pair] == [4242] * 2
    assert not ends


def test_all_stop_at_the_same_step_which_none_has_passed(ends):
    pair = Job(2).join(0, 1)
    stops = []

    def train(one, pause_s):
        for step in range(1, 10_000):
            if one.stops_at(step):
                stops.append(step)
                return
            time.sleep(pause_s)

    threads = [
        threading.Thread(target=train, args=(one, pause_s))
        for one, pause_s in zip(pair, (0.001, 0.003))
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    pair[1].ask_to_stop()
    pair[0].ask_to_stop()
    for thread in threads:
        thread.join(60)
    assert len(stops) == 2 and stops[0] == stops[1] and not ends


def test_a_stop_before_the_first_update_ends_the_others_with_the_same_status(ends):
    first, second = Job(2).join(0, 1)
    second._tell(143, "stopped by SIGTERM")
    wait_for(lambda: ends)
    assert ends[0][0] == 143 and "stopped by SIGTERM" in ends[0][1]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_a_lost_terminal_stops_a_run_unless_nohup_says_no():
    left, before = [], signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = stop_signal.StopSignal(left.append)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked(1)
        stop.restore()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = stop_signal.StopSignal(left.append)
        assert not stop.asked(1)
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(lambda: stop.asked(2))
        assert left == []
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


def test_stop_signal_asks_the_peers():
    asked = []

    class Fake:
        def ask_to_stop(self):
            asked.append(True)

        def stops_at(self, step):
            return bool(asked) and step >= 7

    left = []
    stop = stop_signal.StopSignal(left.append)
    try:
        stop.join(Fake())
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: left)  # nothing was there to save
        assert not stop.asked(5)
        asked.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: asked)
        assert not stop.asked(6) and stop.asked(7)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: left[1:])
        assert left == [signal.SIGTERM, signal.SIGINT]
    finally:
        stop.restore()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("host", 2, 0), "--coordinator=host is not HOST:PORT"),
        (("host:x", 2, 0), "is not HOST:PORT"),
        (("host:1", None, 0), "needs --num_processes and --process_id"),
        (("host:1", 2, 2), "--process_id=2 is not in 0..1"),
        ((None, 2, None), "--num_processes=2 needs --coordinator"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        with distributed.job(*flags):
            pass


def test_a_port_that_is_taken(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of --coordinator cannot be used"):
            with distributed.job(f"localhost:{port}", 2, 0):
                pass


def test_odd_numbers_of_tasks(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1(x2)")
    with pytest.raises(ValueError, match=r"SLURM_NTASKS='1\(x2\)'"):
        with distributed.job():
            pass
