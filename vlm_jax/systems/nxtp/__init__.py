"""NXTP: object recognition as next-token prediction (arXiv 2312.02142). See README.md here.

image ── CLIP ── projection ──┐
prompt ── labels, labels ─────┴── first blocks of a language model ── labels
"""

from vlm_jax.systems.nxtp.format import make_formatter
from vlm_jax.systems.nxtp.model import Nxtp, copy_dtype, from_run, from_upstream
from vlm_jax.systems.nxtp.task import NxtpTask, make_task
from vlm_jax.systems.nxtp.upstream import load_upstream

EXAMPLE = 'model.label("photo.jpg")'  # of the cards of saved models

__all__ = [
    "EXAMPLE",
    "Nxtp",
    "NxtpTask",
    "copy_dtype",
    "from_run",
    "from_upstream",
    "load_upstream",
    "make_formatter",
    "make_task",
]
