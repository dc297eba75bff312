"""Tools on a disk that is full name the place and the remedy."""

import errno
import json
import os

import numpy as np

from vlm_jax.machines import disk
from vlm_jax.tools import convert_weights


def test_what_is_said_of_errors(tmp_path):
    target = tmp_path / "not" / "there.bin"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = disk.explain(full, target)
    assert f"the disk is full: cannot write {target} (" in said and "bytes are free there" in said
    assert "Make room" in said
    quota = RuntimeError(f"ABORTED: {os.strerror(errno.EDQUOT)}; writing")  # as libraries wrap it
    assert "the disk is full" in disk.explain(quota, target)
    assert disk.explain(ValueError("no such preset"), target) == "no such preset"


def test_convert_weights(small_disk, golden_lvm, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    settings = json.loads((golden_lvm / "config.json").read_text())["vqgan"]
    (source / "config.json").write_text(json.dumps(settings))
    weights = (golden_lvm / "vqgan.safetensors").read_bytes()
    (source / "pytorch_model.safetensors").write_bytes(weights)
    filler = small_disk / "filler"
    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    filler.write_bytes(np.zeros(room - 64 * 1024, np.uint8).tobytes())
    target = small_disk / "out"
    arguments = ["--system=vqgan", f"--from={source}", f"--to={target}", "--format=native"]
    assert convert_weights.main(arguments) == 1
    said = capsys.readouterr().err
    assert f"convert_weights: the disk is full: cannot write {target}" in said, said
    assert not list(target.glob("*.safetensors"))
