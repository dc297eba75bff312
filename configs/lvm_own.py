r"""LVM on your own photos and videos: a folder in, a model and pictures out.

    python -m vlm_jax.main --config=configs/lvm_own.py --config.path=FOLDER --workdir=runs/own

FOLDER holds photos (in class folders or not), videos, or both; what there is enough of becomes
visual sentences with the tokenizer that ships in the package: frames of a video, a window moving
over a photo, colour and missing parts by example, images of one class after another. A fifth of the
files, chosen by their content, is held out; the perplexity on it is printed beside those of
guessing, and eval/*/samples/samples.png shows context, generated and true images. Eight images of
32 pixels a sentence, five minutes on two cores. `--config.init.run=RUN` starts from another run.

    python -m vlm_jax.main --config=configs/lvm_own.py:released --config.path=FOLDER \
        --config.init.upstream=LVM_ckpts --config.task.tokenizer=vqvae_ckpts --workdir=...

`:released` goes on from the released 7B weights: sixteen images of 256 pixels a sentence.
More photos than a few thousand: `vlm_jax.tools.tokenize_images`, see docs/own_data.md.
"""

from configs import lvm_3b
from configs.parts import lvm_demo


def get_config(arg=""):
    if arg not in ("", "released"):
        raise ValueError(f"lvm_own: argument {arg!r} is neither '' nor 'released'")
    c = released() if arg else lvm_demo.tiny()
    c.path = ""
    c.task.temperature = 0.0 if arg else 1.0
    images = c.task.context_images + 1
    c.prepare = dict(
        path=c.get_ref("path"), heldout=0.2, most=2_000, tokenizer=c.task.get_ref("tokenizer"),
        image_side=c.task.image_side, images=images, sentences=500 if arg else 1_500,
        heldout_sentences=32,
    )  # fmt: skip

    def sentences(split):
        return dict(
        mixture=dict(own=dict(
            type="array_record", path="{workdir}/own/" + split + "_*.array_record"
        )),
        packing="documents",
    )  # fmt: skip

    def pictures(split):
        return dict(type="own_pictures", path=c.get_ref("path"), split=split, side=128, frames=4)

    c.data = sentences("train")
    c.evals = dict(
        heldout=dict(
            type="perplexity", predict="score", every=200, num_ids=c.task.codebook_size,
            baseline=sentences("train"), data=sentences("heldout"),
        ),
        samples=dict(
            type="image_grid", predict="continue", rows=8, batch_size=8, data=sentences("heldout")
        ),
        colorization=dict(
            type="few_shot", kind="colorization", batch_size=8, max_batches=4,
            formatter=dict(images=images - 1),
            data=dict(max_bad_fraction=0.1, mixture=dict(pairs=dict(
                type="few_shot", answer="colour", shots=(images - 2) // 2,
                queries=pictures("heldout"), examples=pictures("train"),
            ))),
        ),
    )  # fmt: skip
    return c


def released():
    c = lvm_3b.full("lvm_7b", batch_size=8, steps=500)
    c.task.update(image_side=256, codebook_size=8192, tokens_per_image=256, context_images=15)
    c.optim.update(lr=1e-5, end_lr=1e-6, warmup_steps=20)
    c.train.update(save_every=250, milestone_every=0)
    return c
