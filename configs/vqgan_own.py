r"""The image tokenizer on your own photos and videos: what survives it, before and after training.

    python -m vlm_jax.main --config=configs/vqgan_own.py --config.path=FOLDER --workdir=runs/vqgan

FOLDER holds photos, videos (eight frames of each), or both, at any depth. Training goes on from the
small tokenizer that ships in the package (64 pixels, 256 tokens of 1,024 codes) for some minutes on
two cores: on 122 photos that it had not seen, 200 updates took held-out PSNR from 23.13 to 23.53
(thumbnails: 22.74). A fifth of the files, chosen by their content, is held out; its
reconstructions are scored beside a thumbnail of as many pixels as there are tokens, and drawn in
eval/*/heldout/reconstructions.png. From scratch: `--config.init.upstream=`, with
`--config.optim.lr=3e-3 --config.train.steps=1500`; from another run: `--config.init.run=RUN`.

    python -m vlm_jax.main --config=configs/vqgan_own.py:released --config.path=FOLDER \
        --config.init.upstream=vqvae_ckpts --workdir=...

`:released` trains the decoder of the released f16 tokenizer alone, so that its ids keep their
meaning and language models need no new tokens.
"""

from configs import vqgan_f16
from configs.parts import vqgan_demo, vqgan_guards


def get_config(arg=""):
    if arg not in ("", "released"):
        raise ValueError(f"vqgan_own: argument {arg!r} is neither '' nor 'released'")
    c = released() if arg else small()
    c.path = ""

    def pictures(split):
        return dict(
        packing="none",
        max_bad_fraction=0.1,
        mixture=dict(own=dict(
            type="own_pictures", path=c.get_ref("path"), split=split, heldout=0.2, frames=8,
            side=c.formatter.size * 5 // 4,
        )),
    )  # fmt: skip

    c.data, c.evals.heldout.data = pictures("train"), pictures("heldout")
    return c


def small():
    c = vqgan_demo.tiny()
    c.formatter.update(crop="center")
    c.init = dict(run="", upstream="tiny", random="")
    c.optim.update(lr=5e-4, warmup_steps=20)
    c.train.update(steps=400, save_every=200)
    c.train.guards = dict(latents=vqgan_guards.latents_bounded())
    c.evals.heldout.update(every=200)
    return c


def released():
    c = vqgan_f16.decoder()
    c.optim.update(warmup_steps=100)
    c.train.update(steps=5_000, batch_size=16, save_every=1_000, milestone_every=0)
    c.evals.heldout.update(every=1_000, batch_size=16)
    return c
