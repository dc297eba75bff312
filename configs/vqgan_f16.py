r"""VQGAN: an image tokenizer with downsampling 16 and 8,192 codes, from scratch.

    python -m vlm_jax.main --config=configs/vqgan_f16.py --workdir=$RUN \
        --config.data.mixture.photos.path="$DATA/*.tar"

    python -m vlm_jax.main --config=configs/vqgan_f16.py:tiny --workdir=runs/vqgan     # any laptop

The sizes of the full form are those of the released f16-8192 tokenizer. How that one was trained is
not published; the numbers here are those of its family (MaskGIT: batch 256, learning rate 1e-4,
Adam 0.9/0.99, weight average 0.999, entropy penalty 0.1 at temperature 0.01). Reconstruction and
codebook losses only; no perceptual or adversarial term yet.

`:tiny` trains a network of 0.7 M parameters on real photos and video frames of 64x64 pixels. It
downsamples by 4 only (256 tokens of 1,024 codes per image, as many tokens as the full form has): at
16, sixteen tokens could not carry a photo. The package ships the tokenizer that this very recipe
made (vlm_jax/assets/vqgan_tiny).
"""

import ml_collections


def get_config(arg=""):
    if arg not in ("", "tiny"):
        raise ValueError(f"vqgan_f16: argument {arg!r} is neither '' nor 'tiny'")
    return tiny() if arg else full()


def full():
    c = ml_collections.ConfigDict()
    c.system = "vqgan"
    c.model = dict(preset="f16_8192", dtype="bfloat16")
    c.task = dict(
        l1_weight=1.0, l2_weight=0.0, quantizer_weight=1.0, factor_on="commitment",
        entropy_weight=0.1, entropy_temperature=0.01,
    )  # fmt: skip
    c.formatter = dict(size=256, crop="random", min_crop=0.8, flip=True)
    c.data = dict(mixture=dict(photos=dict(type="tar", path="", weight=1.0)), packing="none")
    c.optim = dict(
        lr=1e-4, end_lr=1e-5, warmup_steps=5_000, decay_steps=0, weight_decay=0.0, decay=".*",
        b1=0.9, b2=0.99, clip_norm=1.0, trainable=".*", ema=0.999,
    )  # fmt: skip
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.init = dict(run="", upstream="", random="")
    c.train = dict(
        steps=1_000_000, batch_size=256, accumulate=1, seed=0,
        log_every=50, save_every=2_000, keep_last=3, milestone_every=50_000,
        tensorboard=True, wandb="",
    )  # fmt: skip
    c.evals = dict()
    return c


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
    )  # fmt: skip
    c.evals = dict(
        heldout=dict(
            type="reconstruction", predict="reconstruct", codes=1024, every=300, batch_size=8,
            data=heldout,
        ),
    )  # fmt: skip
    return c
