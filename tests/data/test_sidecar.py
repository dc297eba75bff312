"""Derived arrays are kept; a cache that cannot be written costs time, not the run."""

import errno
import os

import numpy as np
import pytest

from vlm_jax.data import sidecar, wheels


@pytest.fixture
def built(monkeypatch):
    """How often the arrays were computed."""
    calls = []

    def build():
        calls.append(1)
        return {"x": np.arange(3)}

    wheels._temporary_dir.cache_clear()
    return calls, lambda: sidecar.load("test", ["key"], build)["x"].tolist()


def test_arrays_are_computed_once(built, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path))
    calls, load = built
    assert load() == load() == [0, 1, 2] and len(calls) == 1


@pytest.mark.parametrize("cache", ["/proc/cache", "file/cache"])
def test_a_cache_that_cannot_be_made(built, tmp_path, monkeypatch, capsys, cache):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / cache))
    _, load = built
    assert load() == load() == [0, 1, 2]
    said = capsys.readouterr().err
    assert said.count("set VLM_JAX_CACHE") == 1 and os.path.basename(cache) in said


def test_a_cache_on_a_read_only_disk_is_still_read(built, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path))
    calls, load = built
    load()
    monkeypatch.setattr(wheels.os, "access", lambda path, mode: False)
    assert load() == [0, 1, 2] and len(calls) == 1
    assert wheels.cache_dir() == tmp_path and wheels.writable_cache_dir() != tmp_path


def test_a_disk_that_fills_up_keeps_nothing_and_goes_on(built, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(sidecar.np, "savez", full)
    _, load = built
    assert load() == [0, 1, 2]
    assert "not kept for the next start" in capsys.readouterr().err
    assert os.listdir(tmp_path / "index") == []
