"""NExT-Chat: chat, boxes and masks in one conversation (arXiv 2311.04498). See README.md here.

image ── CLIP ── projector ──┐                            ┌── text
question, boxes in it ───────┴── language model ── <at> ──┼── box
                                                          └── mask, by SAM
"""

from vlm_jax.systems.nextchat.task import NextChatTask, make_task
from vlm_jax.systems.nextchat.upstream import load_upstream

__all__ = ["NextChatTask", "load_upstream", "make_task"]
