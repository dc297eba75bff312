"""Small LVMs on real photos and video frames: the forms `:tiny` and `:small` of all sizes.

Two CPU cores, five minutes and half an hour; what to expect is in docs/lvm_evidence.md.
"""

import ml_collections


def tiny():
    codes, side, size = 1024, 32, 64  # of the shipped tokenizer, at 32 pixels
    images = 8  # of a row
    c = ml_collections.ConfigDict()
    c.system = "lvm"
    c.model = dict(
        vocab_size=codes + 100, width=128, depth=3, mlp_width=384, num_heads=2,
        max_tokens=2048, dtype="float32", remat="none",
    )  # fmt: skip
    c.task = dict(
        loss_mean="row", attention="documents", loss_chunk=256, tokenizer="tiny", image_side=side,
        codebook_size=codes, tokens_per_image=size, context_images=images - 1,
        temperature=1.0, top_k=50,  # as the reference samples
    )  # fmt: skip
    # No EOS: every row is one whole sentence.
    c.formatter = dict(
        max_tokens=images * size, fields="<|bos|>,{tokens}", bos_id=codes, eos_id=codes + 1,
        vocab_size=codes + 100,
    )  # fmt: skip
    c.prepare = dict(tokenizer=c.task.get_ref("tokenizer"), image_side=side, images=images)
    shares = dict(video=1.0, pan=2.0, colour=1.0, group=0.5)
    c.data = dict(mixture=_sentences("train", shares), packing="documents")
    heldout = dict(mixture=_sentences("heldout", shares), packing="documents")
    # Which photo of a class comes next cannot be foreseen, and is nothing to look at.
    shown = {kind: share for kind, share in shares.items() if kind != "group"}
    c.optim = dict(
        lr=5e-3, end_lr=1e-4, warmup_steps=20, decay_steps=0, weight_decay=0.1, decay=".*",
        b1=0.9, b2=0.95, clip_norm=1.0, trainable=".*", ema=0.0,
    )  # fmt: skip
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    c.init = dict(run="", upstream="", random="")
    c.train = dict(
        steps=600, batch_size=8, accumulate=1, seed=0,
        log_every=10, save_every=100, keep_last=2, milestone_every=0,
        tensorboard=True, wandb="",
    )  # fmt: skip
    c.evals = dict(
        heldout=dict(
            type="perplexity", predict="score", every=200, num_ids=codes,
            baseline=c.data.to_dict(), data=heldout,
        ),
        samples=dict(
            type="image_grid", predict="continue", rows=8, batch_size=8,
            data=dict(mixture=_sentences("heldout", shown), packing="documents"),
        ),
        context=dict(
            type="context_perplexity", tokens_per_image=size, max_context=images - 1,
            lead_tokens=1, batch_size=8,
            data=dict(mixture=_sentences("heldout", dict(video=1.0)), packing="none"),
        ),
        colorization=dict(
            type="few_shot", kind="colorization", batch_size=8, max_batches=2,
            formatter=dict(images=images - 1),
            data=dict(mixture=dict(pairs=dict(
                type="few_shot", answer="colour", shots=(images - 2) // 2,
                queries=dict(type="demo_photos", split="heldout"),
            ))),
        ),
    )  # fmt: skip
    return c


def small():
    """Sixteen images a sentence, six kinds of sentences; docs/lvm_evidence.md is made with it."""
    size, images, codes = 64, 16, 1024
    shares = dict(video=1.0, pan=1.0, colour=1.5, inpaint=1.0, mask=1.5, group=0.3)
    c = tiny()
    c.model.depth = 4
    c.task.context_images = images - 1
    c.task.temperature = 0.0  # answers are scored, not looked at
    c.formatter.max_tokens = images * size
    c.prepare = dict(
        tokenizer=c.task.get_ref("tokenizer"), image_side=32, images=images, kinds=tuple(shares),
        sentences=1500,
        heldout_sentences=32, crops=1000,
    )  # fmt: skip
    c.data = dict(mixture=_sentences("train", shares), packing="documents")
    c.optim.update(lr=4e-3, warmup_steps=50)
    c.train.update(log_every=20, save_every=200)

    def heldout(kind):
        return dict(mixture=_sentences("heldout", {kind: 1.0}), packing="documents")

    def few_shot(kind, answer, queries):
        return dict(
            type="few_shot", kind=kind, batch_size=16, max_batches=4,
            formatter=dict(images=images - 1),
            data=dict(mixture=dict(pairs=dict(
                type="few_shot", answer=answer, shots=images // 2 - 1, queries=queries
            ))),
        )  # fmt: skip

    def context(kind):
        return dict(
            type="context_perplexity", tokens_per_image=size, max_context=images - 1,
            lead_tokens=1, keep_lead=True, batch_size=16,
            data={**heldout(kind), "packing": "none"},
        )  # fmt: skip

    c.evals = {
        kind: dict(
            type="perplexity", predict="score", num_ids=codes, data=heldout(kind),
            baseline=dict(mixture=_sentences("train", {kind: 1.0}), packing="documents"),
        )
        for kind in shares
    }  # fmt: skip
    c.evals.context_video, c.evals.context_pan = context("video"), context("pan")
    c.evals.colorization = few_shot(
        "colorization", "colour", dict(type="demo_photos", split="heldout")
    )
    c.evals.segmentation = few_shot(
        "segmentation", "mask", dict(type="demo_scenes", split="heldout", count=64)
    )
    return c


def _sentences(split, shares):
    path = "{workdir}/demo/" + split
    return {
        kind: dict(type="array_record", path=f"{path}_{kind}.array_record", weight=share)
        for kind, share in shares.items()
    }
