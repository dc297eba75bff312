"""NExT-Chat: chat, boxes and masks in one conversation (arXiv 2311.04498). See README.md here.

image ── CLIP ── projector ──┐                            ┌── text
question, boxes in it ───────┴── language model ── <at> ──┼── box
                                                          └── mask, by SAM
"""

from vlm_jax.systems.nextchat.format import make_formatter
from vlm_jax.systems.nextchat.model import NextChat, copy_dtype, from_run, from_upstream
from vlm_jax.systems.nextchat.task import NextChatTask, make_task
from vlm_jax.systems.nextchat.upstream import load_upstream

EXAMPLE = 'model.chat("photo.jpg", "Where is the dog?")'  # of the cards of saved models

__all__ = [
    "EXAMPLE",
    "NextChat",
    "NextChatTask",
    "copy_dtype",
    "from_run",
    "from_upstream",
    "load_upstream",
    "make_formatter",
    "make_task",
]
