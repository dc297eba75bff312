"""What the three stages of NExT-Chat share (arXiv 2311.04498, sec. 4; released scripts)."""

import ml_collections


def full(steps, trainable, masks=False):
    """Batch 64, learning rate 2e-5 to 0 with 3 % of warm-up, whatever the stage."""
    c = ml_collections.ConfigDict()
    c.system = "nextchat"
    c.model = dict(
        vision=dict(preset="l14_336", dtype="bfloat16"),
        decoder=dict(preset="vicuna_7b", dtype="bfloat16", remat="full"),
    )
    if masks:
        c.model.sam = dict(preset="vit_h", dtype="bfloat16")
    c.task = dict(
        text_weight=1.0, l1_weight=2.0, giou_weight=0.2, cycle_weight=1.0, loss_chunk=512,
        giou_mean="boxes",  # "ordered" as released
    )  # fmt: skip
    c.formatter = dict(
        tokenizer="", image_size=336, sam_size=1024 if masks else 0, max_tokens=2048, locations=32,
        masks=1,
    )  # fmt: skip
    c.optim = dict(
        lr=2e-5, end_lr=0.0, schedule="cosine", warmup_steps=round(0.03 * steps), decay_steps=steps,
        weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8, clip_norm=1.0, trainable=trainable, ema=0.0,
    )  # fmt: skip
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    c.init = dict(run="", upstream="", random="")
    c.train = dict(
        steps=steps, batch_size=64, accumulate=1, seed=42,
        log_every=10, save_every=1_000, keep_last=3, milestone_every=0,
        tensorboard=True, wandb="",
    )  # fmt: skip
    return c


def corpora(**weights):
    """Name -> annotations of it in a form, see `datasets/grounded_annotations.py`."""
    return {
        name: dict(type="grounded_annotations", path="", root="", form=form, weight=weight)
        for name, (form, weight) in weights.items()
    }


def grounding(predict):
    """RefCOCO, RefCOCO+ and RefCOCOg, every split of the paper: answers that are given."""
    splits = dict(
        refcoco=("val", "testA", "testB"), refcoco_plus=("val", "testA", "testB"),
        refcocog=("val", "test"),
    )  # fmt: skip
    several = "none" if predict == "masks" else "first"
    return {
        f"{corpus}_{split}": dict(
            type="grounding", predict=predict, several=several, batch_size=8,
            data=dict(
                mixture=dict(heldout=dict(
                    type="grounded_annotations", form="res" if predict == "masks" else "rec",
                    path="", root="",
                )), shuffle=False
            ),
        )
        for corpus, names in splits.items() for split in names
    }  # fmt: skip
