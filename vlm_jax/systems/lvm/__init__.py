"""LVM: visual sentences as token sequences (arXiv 2312.00785). See README.md in this folder.

images ── VQGAN ── ids ── visual sentences ── LLaMA ── ids ── VQGAN ── images
"""

from vlm_jax.systems.lvm.checkpoint import copy_dtype, from_run, from_upstream
from vlm_jax.systems.lvm.format import make_formatter
from vlm_jax.systems.lvm.input_files import prepare
from vlm_jax.systems.lvm.model import Lvm
from vlm_jax.systems.lvm.task import LvmTask
from vlm_jax.systems.lvm.upstream import load_upstream, make_task

EXAMPLE = "model.continue_([frame1, frame2, frame3], n=1)"  # of the cards of saved models

__all__ = [
    "EXAMPLE",
    "Lvm",
    "LvmTask",
    "copy_dtype",
    "from_run",
    "from_upstream",
    "load_upstream",
    "make_formatter",
    "make_task",
    "prepare",
]
