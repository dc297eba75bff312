r"""NExT-Chat, stage 2: instructions, from the parameters of stage 1 (arXiv 2311.04498).

    python -m vlm_jax.main --config=configs/nextchat_stage2.py --workdir=$RUN2 \
        --config.formatter.tokenizer=$VICUNA/tokenizer.model --config.init.run=$RUN1 ...

Hardware: 8 A100-80G, 10 hours as published. Accuracy of boxes at IoU .5 to expect (7B): RefCOCO
85.5 / 90.0 / 77.9, RefCOCO+ 77.2 / 84.5 / 68.0, RefCOCOg 80.1 / 79.8 (paper, table 2).

Half of the rows are grounded reasoning and chat, half of five kinds of stage 1 in equal parts.
"""

from configs.parts import nextchat
from vlm_jax.systems.nextchat.task import TRAINED


def get_config(arg=""):
    if arg:
        raise ValueError(f"nextchat_stage2: argument {arg!r} is not ''")
    c = nextchat.full(4_950, TRAINED[2])
    c.data = dict(
        mixture=nextchat.corpora(
            # Shikra's two and a third of LLaVA-Instruct-150K; set these to their sizes.
            gpt4gen=("reasoning", 0.5 / 3),
            shikra_rd=("reasoning", 0.5 / 3),
            llava_instruct=("chat", 0.5 / 3),
            flickr30k=("grounded caption", 0.1),
            refcoco=("rec", 0.1),
            vqa=("vqa", 0.1),
            vcr=("vcr", 0.1),
            captions=("caption", 0.1),
        )
    )
    c.evals = nextchat.grounding("boxes")
    return c
