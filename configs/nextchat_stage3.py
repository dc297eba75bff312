r"""NExT-Chat, stage 3: masks, by SAM ViT-H on the parameters of stage 2 (arXiv 2311.04498).

    python -m vlm_jax.main --config=configs/nextchat_stage3.py --workdir=$RUN3 \
        --config.formatter.tokenizer=$VICUNA/tokenizer.model --config.init.run=$RUN2 \
        --config.init.upstream=sam=sam_vit_h_4b8939.pth \
        --config.data.mixture.res.path=res.jsonl --config.data.mixture.res.root=$COCO

Hardware: 8 A100-80G, 3 hours as published. cIoU of masks to expect (7B): RefCOCO 74.7 / 78.9 /
69.5, RefCOCO+ 65.1 / 71.9 / 56.7, RefCOCOg 67.0 / 67.0 (paper, table 1), from answers that are
generated; the evaluations here are given the answer's words.

Only the projection to SAM's prompts and SAM's mask decoder learn; text and boxes stay as they are.
Three epochs of 127,000 masks.
"""

from configs.parts import nextchat
from vlm_jax.systems.nextchat.task import TRAINED


def get_config(arg=""):
    if arg:
        raise ValueError(f"nextchat_stage3: argument {arg!r} is not ''")
    c = nextchat.full(5_950, TRAINED[3], masks=True)
    c.init.random = "^mask_prompt/"
    c.task.update(text_weight=0.0, l1_weight=0.0, giou_weight=0.0, cycle_weight=0.0)
    c.data = dict(mixture=nextchat.corpora(res=("res", 1.0)))
    c.evals = nextchat.grounding("masks")
    return c
