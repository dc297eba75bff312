r"""VQGAN: an image tokenizer with downsampling 16 and 8,192 codes.

    python -m vlm_jax.main --config=configs/vqgan_f16.py --workdir=$RUN \
        --config.data.mixture.photos.path="$DATA/train-*.tar" \
        --config.evals.heldout.data.mixture.photos.path="$DATA/heldout-*.tar"

    python -m vlm_jax.main --config=configs/vqgan_f16.py:decoder --workdir=$RUN2 \
        --config.init.upstream=$TOKENIZER ...                      # and both paths, as above

    python -m vlm_jax.main --config=configs/vqgan_f16.py:tiny --workdir=runs/vqgan     # any laptop
    python -m vlm_jax.main --config=configs/vqgan_f16.py:tiny_decoder --workdir=runs/decoder

The sizes of the full form are those of the released f16-8192 tokenizer. How that one was trained is
not published; the numbers here are those of its family. Of MaskGIT: batch 256, learning rate 1e-4,
Adam 0/0.99, weight average 0.999, entropy penalty 0.1 at temperature 0.01. Of taming-transformers:
LPIPS with weight 1, PatchGAN with hinge loss and adaptive weight 0.8, starting late.

`:decoder` trains only the decoder of a tokenizer that exists (Muse, arXiv 2301.00704, sec. 2.8):
encoder and codebook stay, so every id keeps its meaning and language models need no new data.

`:tiny` trains a network of 0.7 M parameters on real photos and video frames of 64x64 pixels. It
downsamples by 4 only (256 tokens of 1,024 codes per image, as many tokens as the full form has): at
16, sixteen tokens could not carry a photo. The package ships the tokenizer that this very recipe
made (vlm_jax/assets/vqgan_tiny). `:tiny_decoder` goes on with the decoder of that one, with LPIPS
(first three stages) and the discriminator.

Hardware, hours and numbers of the released tokenizer are not stated. No full form has been run to
its end.
"""

import ml_collections

from configs.parts import vqgan_demo, vqgan_guards

tiny, tiny_decoder = vqgan_demo.tiny, vqgan_demo.tiny_decoder
FORMS = ("", "decoder", "tiny", "tiny_decoder")


def get_config(arg=""):
    if arg not in FORMS:
        known = ", ".join(map(repr, FORMS))
        raise ValueError(f"vqgan_f16: argument {arg!r} is none of {known}")
    forms = {
        "": full,
        "decoder": decoder,
        "tiny": tiny,
        "tiny_decoder": tiny_decoder,
    }
    return forms[arg]()


def full():
    c = ml_collections.ConfigDict()
    c.system = "vqgan"
    c.model = dict(preset="f16_8192", dtype="bfloat16")
    c.task = dict(
        l1_weight=1.0, l2_weight=0.0, quantizer_weight=1.0, factor_on="commitment",
        entropy_weight=0.1, entropy_temperature=0.01,
        perceptual_weight=1.0, perceptual_stages=5, perceptual_dtype="bfloat16",
        perceptual_vgg="", perceptual_heads="",
        gan_weight=0.8, gan_adaptive=True, gan_start=100_000, gan_loss="hinge", r1_weight=0.0,
        disc_width=64, disc_layers=3, disc_groups=32,
        revive_every=0, revive_floor=0.05, revive_decay=0.9, revive_rows=64,
    )  # fmt: skip
    c.formatter = dict(size=256, crop="random", min_crop=0.8, flip=True)
    c.data = dict(mixture=dict(photos=dict(type="tar", path="", weight=1.0)), packing="none")
    c.optim = dict(
        lr=1e-4, end_lr=1e-5, warmup_steps=5_000, decay_steps=0, weight_decay=0.0, decay=".*",
        b1=0.0, b2=0.99, clip_norm=1.0, trainable="^(?!perceptual|codebook_usage)", ema=0.999,
        lr_scale={"^discriminator/": 1.0},
    )  # fmt: skip
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.init = dict(run="", upstream="", random="")
    c.train = dict(
        steps=1_000_000, batch_size=256, accumulate=1, seed=0,
        log_every=50, save_every=2_000, keep_last=3, milestone_every=50_000,
        tensorboard=True, wandb="",
        guards=dict(
            codes=vqgan_guards.codes_in_use(400.0, after=10_000, patience=1_000),
            latents=vqgan_guards.latents_bounded(),
            discriminator=vqgan_guards.discriminator_beatable(after=110_000, patience=5_000),
        ),
    )  # fmt: skip
    # Not every path need be given: without held-out pictures, set evals to {}.
    c.evals = dict(
        heldout=dict(
            type="reconstruction", predict="reconstruct", codes=8192, every=5_000, batch_size=64,
            max_batches=80, ssim=True, lpips=True, frechet=True, layer="relu5_3",
            data=dict(mixture=dict(photos=dict(type="tar", path="")), packing="none"),
        ),
    )  # fmt: skip
    return c


def decoder():
    c = full()
    c.task.update(quantizer_weight=0.0, entropy_weight=0.0, gan_start=0)
    c.optim.update(lr=5e-5, warmup_steps=1_000, trainable=vqgan_demo.DECODER_ONLY)
    c.init.random = "^discriminator/"
    c.train.steps = 200_000
    c.train.guards = dict(
        discriminator=vqgan_guards.discriminator_beatable(after=10_000, patience=5_000)
    )
    return c
