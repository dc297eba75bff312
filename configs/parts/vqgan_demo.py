"""Small tokenizers on real photos and video frames: `:tiny` and `:tiny_decoder`.

Two CPU cores, eight minutes; the package ships what `tiny` made (vlm_jax/assets/vqgan_tiny).
"""

import ml_collections

from configs.parts import vqgan_guards

DECODER_ONLY = r"^(decoder|post_quant_conv|discriminator)/"


def tiny():
    size = 64
    c = ml_collections.ConfigDict()
    c.system = "vqgan"
    c.model = dict(preset="tiny", dtype="float32")
    c.task = dict(
        l1_weight=0.5, l2_weight=4.0, quantizer_weight=1.0, factor_on="commitment",
        entropy_weight=0.02, entropy_temperature=0.1,
    )  # fmt: skip
    c.formatter = dict(size=size, crop="none", flip=False)
    c.data = dict(
        mixture=dict(
            photos=dict(type="demo_photos", split="train", crops=4_000, size=size, weight=0.85),
            frames=dict(
                type="demo_frames", split="train", size=size, videos=("carphone", "bikes"),
                weight=0.15,
            ),
        ),
        packing="none",
    )  # fmt: skip
    heldout = dict(
        mixture=dict(photos=dict(type="demo_photos", split="heldout", crops=0, size=size)),
        packing="none",
    )
    c.optim = dict(
        lr=3e-3, end_lr=5e-5, warmup_steps=30, decay_steps=0, weight_decay=0.0, decay=".*",
        b1=0.9, b2=0.99, clip_norm=1.0, trainable=".*", ema=0.0,
        # Codes have to follow the latents, which move far in the first hundred steps.
        lr_scale={"quantize/embedding": 10.0},
    )  # fmt: skip
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    c.init = dict(run="", upstream="", random="")
    c.train = dict(
        steps=1_500, batch_size=8, accumulate=1, seed=0,
        log_every=20, save_every=300, keep_last=2, milestone_every=0,
        tensorboard=True, wandb="",
        guards=dict(
            codes=vqgan_guards.codes_in_use(20.0, after=300, patience=200),
            latents=vqgan_guards.latents_bounded(),
        ),
    )  # fmt: skip
    c.evals = dict(
        heldout=dict(
            type="reconstruction", predict="reconstruct", codes=1024, every=300, batch_size=8,
            ssim=True, data=heldout,
        ),
    )  # fmt: skip
    return c


def tiny_decoder():
    c = tiny()
    c.task = dict(
        l1_weight=1.0, l2_weight=0.0, quantizer_weight=0.0, factor_on="commitment",
        perceptual_weight=1.0, perceptual_stages=3,
        gan_weight=0.8, gan_adaptive=True, gan_start=100, gan_loss="hinge",
        disc_width=32, disc_layers=2, disc_groups=8,
    )  # fmt: skip
    c.optim.update(
        lr=1e-3, warmup_steps=20, b1=0.5, trainable=DECODER_ONLY,
        lr_scale={"^discriminator/": 0.5},
    )  # fmt: skip
    c.init = dict(run="", upstream="tiny", random="^discriminator/")
    c.train.update(steps=300, save_every=100)
    c.train.guards = dict(
        discriminator=vqgan_guards.discriminator_beatable(after=200, patience=200)
    )
    c.evals.heldout.update(every=100, lpips=True, frechet=True, layer="relu3_3")
    return c
