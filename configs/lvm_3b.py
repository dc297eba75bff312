r"""LVM 3B: a LLaMA over visual sentences, from scratch (arXiv 2312.00785).

    python -m vlm_jax.main --config=configs/lvm_3b.py --workdir=$RUN \
        --config.data.mixture.uvd.path="$DATA/*.array_record"

    python -m vlm_jax.main --config=configs/lvm_3b.py:tiny --workdir=runs/lvm      # any laptop

The full form follows the paper where it is known (2 M tokens an update, 4,096 tokens = 16 images a
row) and the published 7B command for the rest (learning rates, warm-up, clipping, decay). Tokens
come from the released f16-8192 tokenizer, as the upstream JSONL (type "jsonl") or as ArrayRecord.
Sentences are packed without seeing each other, every token weighs the same in the loss;
`:reference` packs and weighs as the released code does.

The paper's evaluations are listed and inactive until they have data, for example

    --config.task.tokenizer=$VQGAN \
    --config.evals.segmentation.data.mixture.pairs.queries.path=$VOC/VOCdevkit/VOC2012

`:tiny` trains a small network on real photos and video frames with the tokenizer that ships in the
package (eight images of 32 pixels a sentence), then prints held-out perplexity beside the uniform
and the unigram baseline and writes eval/*/samples/samples.png: context, generated and true images.
Two CPU cores, five minutes: token perplexity 94 against 930 (unigram) and 1,024 (uniform).
`:small` is its larger sister: sixteen images, more kinds of sentences, tasks that are scored.
"""

import ml_collections


def get_config(arg=""):
    return recipe("lvm_3b", arg)


def recipe(preset, arg="", batch_size=512, steps=200_000, decay_steps=0, accumulate=1):
    """Shared by all sizes; the numbers are those of the full forms."""
    if arg in ("tiny", "small"):
        return tiny() if arg == "tiny" else small()
    if arg not in ("", "reference"):
        raise ValueError(
            f"{preset}: argument {arg!r} is neither '' nor 'tiny', 'small', 'reference'"
        )
    c = full(preset, batch_size, steps, arg == "reference")
    c.optim.decay_steps = decay_steps or steps
    c.train.accumulate = accumulate
    return c


def full(preset, batch_size, steps, reference=False):
    c = ml_collections.ConfigDict()
    c.system = "lvm"
    c.model = dict(preset=preset, dtype="bfloat16", remat="full", max_tokens=4096)
    # A row of 16 images is one sentence: with EOS it would not fit, and nothing needs to end it.
    kind = dict(
        loss_mean="token", attention="documents", packing="documents", fields="<|bos|>,{tokens}"
    )
    if reference:  # sentences straddle rows, attention is not cut, rows weigh the same
        kind = dict(
            loss_mean="row", attention="causal", packing="stream", fields="<|bos|>,{tokens},<|eos|>"
        )
    c.task = dict(
        loss_mean=kind["loss_mean"], attention=kind["attention"], tokenizer="",
        temperature=1.0, top_k=50,  # as the reference samples
    )  # fmt: skip
    c.formatter = dict(
        max_tokens=4096, fields=kind["fields"], bos_id=8192, eos_id=8193, vocab_size=8292
    )
    c.data = dict(
        mixture=dict(uvd=dict(type="array_record", path="", weight=1.0)), packing=kind["packing"]
    )
    c.optim = dict(
        lr=1.5e-4, end_lr=3e-5, warmup_steps=8_000, decay_steps=steps,
        weight_decay=0.1, decay=".*",  # upstream decays norms and embeddings too
        b1=0.9, b2=0.95, clip_norm=1.0, trainable=".*", ema=0.0,
    )  # fmt: skip
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    c.init = dict(run="", upstream="", random="")
    c.train = dict(
        steps=steps, batch_size=batch_size, accumulate=1, seed=0,
        log_every=10, save_every=1_000, keep_last=3, milestone_every=10_000,
        tensorboard=True, wandb="",
    )  # fmt: skip
    c.evals = paper_evals(lead=not reference)
    return c


def paper_evals(lead, shots=5, rows=32):
    """The paper's evaluations, each inactive until its `path` is given.

    Args:
      lead: whether prompts begin with BOS: as runs of our own are trained. The reference and its
        released weights have none (`:reference`), nor has its perplexity.
      shots: pairs in front of a query; 5 in the paper.
      rows: of a batch, a multiple of data * fsdp of the mesh.
    """

    def prompts(**source):
        return dict(mixture=source, packing="none")

    def few_shot(kind, answer, queries, **fields):
        pairs = dict(type="few_shot", answer=answer, shots=shots, queries=queries)
        return dict(
            type="few_shot", kind=kind, batch_size=rows, data=prompts(pairs=pairs),
            formatter=dict(images=2 * shots + 1, targets=1, lead=lead), **fields,
        )  # fmt: skip

    masks, boxes = (dict(type="pascal5i", kind=kind, path="") for kind in ("mask", "box"))
    photos = dict(type="image_folder", path="", limit=1000)  # ImageNet's validation images
    return dict(
        # The upstream JSONL {"input": [paths], "target": [paths]}.
        perplexity=dict(
            type="perplexity", batch_size=rows, formatter=dict(images=15, targets=1, lead=False),
            data=prompts(list=dict(type="visual_prompts", path="")),
        ),
        # Token files of videos, 16 frames a sentence.
        context=dict(
            type="context_perplexity", tokens_per_image=256, lead_tokens=1,
            batch_size=rows, data=prompts(videos=dict(type="array_record", path="")),
        ),
        segmentation=few_shot("segmentation", "mask", masks),
        detection=few_shot("detection", "mask", boxes),
        colorization=few_shot("colorization", "colour", photos, lpips=True),
        # The upstream JSONL {"input": [paths], "output": path}.
        generation=dict(
            type="generation", batch_size=rows, candidates=2, resize_output="", show_inputs=False,
            formatter=dict(images=15, targets=1, lead=lead),
            data=prompts(list=dict(type="visual_prompts", path="", output=True)),
        ),
    )  # fmt: skip


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
