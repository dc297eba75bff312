r"""A small LVM that works by example, on composed scenes of real cut-outs.

    python -m vlm_jax.main --config=configs/lvm_incontext.py:tokenizer --workdir=TOK
    python -m vlm_jax.tools.export_run --workdir=TOK --to=TOKENIZER
    python -m vlm_jax.main --config=configs/lvm_incontext.py --workdir=RUN \
        --config.task.tokenizer=TOKENIZER

benchmarks/incontext.py does the three in one go and within a given time. Five and a half minutes on
an H200, without the tokenizer: masks .69 IoU on held-out scenes, a copy of the query .15.
Scenes: datasets/composed_scenes.py. Eight images of 32 pixels (64 ids each) a sentence; 5.1 M
parameters. Without the first two steps the language model uses the tokenizer of 64 pixels that
ships in the package, which knows no bright colours.

`:tokenizer` trains the shipped tokenizer on, at 32 pixels and on these scenes.
`:anneal` lowers the learning rate of weights that were trained at a high one down to 0, on a CPU:
`--config.init.upstream=FOLDER` says which; `tiny`, the shipped one, is trained to the end already.
`:tiny` is for a CPU: it shows that everything runs, in a minute, and learns little.

Scored on scenes of things and grounds, and palettes, that training never has:

    masks     IoU of the thing, three examples, datasets/demo_scenes.py
    colours   MSE of the scene in the two colours of the examples, datasets/palette_scenes.py
    photos    MSE of a photo from its grey version, datasets/demo_photos.py
"""

from configs.parts import lvm_demo, vqgan_demo, vqgan_guards

SIDE, IDS, CODES, IMAGES = 32, 64, 1024, 8
# Questions of pairs, which cannot be foreseen, weigh a tenth of the answers in the loss.
PAIRS = dict(mask=0.32, box=0.08, edges=0.1, colour=0.32, photo=0.08)


def get_config(arg=""):
    forms = {"": full, "anneal": anneal, "tiny": tiny, "tokenizer": tokenizer}
    if arg not in forms:
        raise ValueError(
            f"lvm_incontext: argument {arg!r} is none of {', '.join(map(repr, forms))}"
        )
    return forms[arg]()


def full():
    c = lvm_demo.tiny()
    # Answers look at the same place of earlier images: short waves and many heads for that.
    c.model = dict(
        vocab_size=CODES + 100, width=256, depth=6, mlp_width=640, num_heads=8,
        max_tokens=2048, rope_theta=1e3, dtype="bfloat16", remat="none",
    )  # fmt: skip
    # Every row is one whole sentence, so no two share one.
    c.task.update(
        loss_mean="token", attention="causal", loss_chunk=0, context_images=IMAGES - 1,
        temperature=0.0,  # answers are scored
    )  # fmt: skip
    c.formatter.max_tokens = IMAGES * IDS
    c.prepare = dict(
        of="composed", tokenizer=c.task.get_ref("tokenizer"), image_side=SIDE, chunk=500, seed=0,
        sentences=dict(
            mask=70_000, box=15_000, edges=20_000, colour=70_000, photo=15_000, motion=20_000
        ),
    )  # fmt: skip
    # Sentences are drawn at random already.
    c.data = dict(mixture=mixture(), packing="none", shuffle=False, prefetch_batches=8)
    c.optim.update(lr=2e-3, end_lr=3e-5, warmup_steps=150)
    c.train.update(steps=3_000, batch_size=256, log_every=50, save_every=500)
    c.evals = dict(
        masks=few_shot("segmentation", "mask", type="demo_scenes", split="heldout", count=64),
        colours=few_shot(
            "colorization", "colour", type="palette_scenes", split="heldout", count=64, size=SIDE
        ),
        photos=few_shot("colorization", "colour", type="demo_photos", split="heldout", size=SIDE),
    )  # fmt: skip
    return c


def mixture():
    pairs = {kind: table(kind, 0.1, share) for kind, share in PAIRS.items()}
    return {**pairs, "motion": table("motion", 1.0, 0.1)}


def table(kind, question_weight, weight):
    return dict(
        type="token_table", path="{workdir}/composed/" + f"{kind}.npy", tokens_per_image=IDS,
        question_weight=question_weight, weight=weight,
    )  # fmt: skip


def few_shot(kind, answer, **queries):
    return dict(
        type="few_shot", kind=kind, batch_size=32, formatter=dict(images=IMAGES - 1),
        data=dict(mixture=dict(pairs=dict(
            type="few_shot", answer=answer, shots=IMAGES // 2 - 1, queries=queries,
        ))),
    )  # fmt: skip


def anneal():
    """Ten minutes of two CPU cores. Masks and colours; few of the rest, against forgetting."""
    c = full()
    c.model.dtype = "float32"
    c.task.tokenizer = "tiny32"
    c.prepare.update(chunk=50, seed=1)
    c.prepare.sentences = dict(box=150, colour=900, edges=150, mask=1_800)
    shares = dict(mask=0.65, box=0.03, edges=0.02, colour=0.3)
    c.data.mixture = {kind: table(kind, 0.1, share) for kind, share in shares.items()}
    c.data.update(num_threads=2, prefetch_batches=2)
    c.init.upstream = "tiny"
    c.optim.update(lr=5e-4, end_lr=0.0, schedule="linear", warmup_steps=5)
    c.train.update(steps=80, batch_size=16, log_every=5, save_every=20)
    return c


def tiny():
    c = full()
    c.model.update(width=96, depth=3, mlp_width=256, num_heads=2, dtype="float32")
    c.prepare.update(
        chunk=8,
        sentences=dict(mask=160, box=16, edges=16, colour=160, photo=16, motion=16),
    )
    c.data.update(prefetch_batches=2)
    c.optim.update(lr=4e-3, warmup_steps=10)
    c.train.update(steps=60, batch_size=8, log_every=10, save_every=60)
    for evaluation in c.evals.values():
        evaluation.update(batch_size=8, max_batches=1)
    return c


def tokenizer():
    c = vqgan_demo.tiny()
    c.prepare = dict(
        sentences=dict(mask=4_000, box=500, edges=1_500, colour=6_000, photo=5_000, motion=500),
        side=SIDE, chunk=500, seed=1,
    )  # fmt: skip
    c.model.resolution = SIDE
    c.formatter.size = SIDE
    c.data = dict(
        mixture=dict(scenes=dict(type="picture_table", path="{workdir}/composed/pictures.npy")),
        packing="none", shuffle=False, num_threads=1, prefetch_batches=8,  # tiny pictures
    )  # fmt: skip
    c.optim.update(lr=2e-3, warmup_steps=100)
    c.init.upstream = "tiny"
    c.train.update(
        steps=6_000, batch_size=128, log_every=100, save_every=1_000,
        guards=dict(latents=vqgan_guards.latents_bounded()),
    )  # fmt: skip
    c.evals = dict(
        photos=heldout(type="demo_photos", split="heldout", size=SIDE),
        palettes=heldout(type="palette_scenes", split="heldout", count=64, size=SIDE),
    )
    return c


def heldout(**pictures):
    return dict(
        type="reconstruction", predict="reconstruct", codes=CODES, batch_size=64, ssim=True,
        data=dict(mixture=dict(pictures=pictures), packing="none"),
    )  # fmt: skip
