r"""LVM 3B: a LLaMA over visual sentences, from scratch (arXiv 2312.00785).

    python -m vlm_jax.main --config=configs/lvm_3b.py --workdir=$RUN \
        --config.data.mixture.uvd.path="$DATA/*.array_record"

    python -m vlm_jax.main --config=configs/lvm_3b.py:tiny --workdir=runs/lvm      # any laptop

Hardware: TPU v3 pods; the 3B model took about 14 days on a v3-512. Numbers to expect: perplexity of
the next frame of Kinetics-700 falls from 62.1 to 48.4 with 1 to 15 frames of context (of which size
is not stated), and by size; others are figures without numbers.

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

from configs.parts import lvm_demo, lvm_evaluations

tiny, small = lvm_demo.tiny, lvm_demo.small


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
    c.evals = lvm_evaluations.paper(lead=not reference)
    return c
