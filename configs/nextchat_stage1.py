r"""NExT-Chat, stage 1: boxes in and out of Vicuna 7B, from CLIP ViT-L/14-336 (arXiv 2311.04498).

    python -m vlm_jax.main --config=configs/nextchat_stage1.py --workdir=$RUN1 \
        --config.formatter.tokenizer=$VICUNA/tokenizer.model \
        --config.init.upstream=clip=$CLIP336,llama=$VICUNA \
        --config.data.mixture.refcoco.path=refcoco.jsonl \
        --config.data.mixture.refcoco.root=$COCO ...

Hardware: 8 A100-80G, 59 hours as published. Numbers to expect behind all stages: see
`nextchat_stage2.py`.

Every corpus is a file of annotations (`datasets/grounded_annotations.py`), drawn in proportion to
its size; one file may be told in two forms. One that is not there is taken out:
`--config.data.mixture="{...}"`. The published mixture: a twentieth of
Visual Genome's region captions and a tenth of its regions as questions, VQAv2, COCO captions,
RefCOCO/+/g both ways, Flickr30k Entities, VCR, Visual7W.
"""

from configs.parts import nextchat
from vlm_jax.systems.nextchat.task import TRAINED


def get_config(arg=""):
    if arg:
        raise ValueError(f"nextchat_stage1: argument {arg!r} is not ''")
    c = nextchat.full(65_000, TRAINED[1])
    c.init.random = r"^(projector|box_encoder|box_decoder)/"
    c.data = dict(
        mixture=nextchat.corpora(
            vg_captions=("region caption", "records"),
            vg_regions=("rec", "records"),
            vqav2=("vqa", "records"),
            coco_captions=("caption", "records"),
            refcoco=("rec", "records"),
            refcoco_captions=("region caption", "records"),
            flickr30k=("grounded caption", "records"),
            vcr=("vcr", "records"),
            visual7w=("pointing", "records"),
        )
    )
    c.evals = nextchat.grounding("boxes")
    return c
