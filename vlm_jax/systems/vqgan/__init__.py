"""VQGAN: training the image tokenizer, and its use. See README.md in this folder.

image01 ── encoder ── z ── nearest code ── ids ── codes ── decoder ── recon01
"""

from vlm_jax.systems.vqgan.composed import prepare
from vlm_jax.systems.vqgan.format import make_formatter
from vlm_jax.systems.vqgan.task import VqganTask, make_task
from vlm_jax.systems.vqgan.tokenizer import from_run, from_upstream, load_upstream

EXAMPLE = "ids = model.encode(picture); model.decode_u8(ids[None])"  # of the cards of saved models

__all__ = [
    "EXAMPLE",
    "VqganTask",
    "from_run",
    "from_upstream",
    "load_upstream",
    "make_formatter",
    "make_task",
    "prepare",
]
