r"""Labels for your own photos: a folder in, a model that labels, and its scores out.

    python -m vlm_jax.main --config=configs/nxtp_own.py --config.path=FOLDER --workdir=runs/labels

FOLDER holds photos in class folders, whose names are the labels; or photos and a .csv or .jsonl
with a column `file` and one of `label`, `labels` or `caption` (nouns of captions become labels;
`pip install "vlm_jax[labels]"`). --config.path may also name such a table. A fifth of the photos,
chosen by their content, is held out; its scores are printed beside those of the most frequent
labels and of the nearest training photo, and drawn in eval/*/heldout/labels.png; one label a
photo, with `--config.evals.heldout.k=5` five.

Three blocks of the real SmolLM2 learn behind a frozen, real VGG16 at 64 pixels: four minutes on two
cores. `--config.init.run=RUN` starts from another run.

    python -m vlm_jax.main --config=configs/nxtp_own.py:released --config.path=FOLDER \
        --config.init.upstream="nxtp=ckpt_epoch_03.pth,clip=ViT-L-14.pt" \
        --config.formatter.tokenizer=LLAMA/tokenizer.model --workdir=...

`:released` goes on from the released weights: 224 pixels, 1.78 B parameters.
"""

from configs import nxtp_g3m


def get_config(arg=""):
    if arg not in ("", "released"):
        raise ValueError(f"nxtp_own: argument {arg!r} is neither '' nor 'released'")
    c = released() if arg else nxtp_g3m.tiny()
    c.path = ""
    c.formatter.tagger = "textblob"

    def photos(split):
        return dict(
        max_bad_fraction=0.1,
        mixture=dict(own=dict(
            type="own_pictures", path=c.get_ref("path"), split=split, heldout=0.2, texts=True,
            side=c.formatter.image_size * 5 // 4,
        )),
    )  # fmt: skip

    c.data = photos("train")
    c.evals = dict(
        heldout=dict(
            type="label_match", predict="one_shot", k=1, ks=(1, 3, 5, 10), batch_size=16, every=0,
            data={**photos("heldout"), "shuffle": False}, baseline=photos("train"),
        )
    )  # fmt: skip
    return c


def released():
    c = nxtp_g3m.full({}, steps=1_000, batch_size=32)
    c.optim.update(warmup_steps=100)
    c.init.random = ""
    c.train.update(save_every=250, milestone_every=0)
    return c
