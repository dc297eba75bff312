"""Every formatter on records with one value of another kind: a named error, nothing else."""

import numpy as np
import pytest

from vlm_jax.data import images, records
from vlm_jax.systems.lvm import format as lvm_format
from vlm_jax.systems.lvm import prompts
from vlm_jax.systems.nxtp import labels
from vlm_jax.systems.vqgan import format as vqgan_format

PIXELS = np.zeros((4, 4, 3), np.uint8)
PNG = images.encode(PIXELS)
ODD = [
    None, True, 5, -1, 1.5, float("inf"), float("nan"), 10**30, "", "x" * 300, "\ud800", "\0",
    "/dev/zero", "~nobody", b"", b"\xff" * 10, [], [[]], [None], [1.5], ["a", 1], [{}], {},
    {"a": 1}, np.zeros(3), np.zeros((0, 0, 3), np.uint8), np.array([{}], object), (1, 2),
    np.array("x"),
]  # fmt: skip


class Words:
    """Every word is a noun."""

    def tag(self, text):
        return [(word, "NN") for word in text.split()]

    def lemma(self, noun):
        return noun


def label(record):
    return images.of_record(record), labels.of_record(record, Words())


def train_vqgan(record):
    return vqgan_format.Formatter(size=8)(record, np.random.default_rng(0))


SENTENCE = {"tokens": [1, 2, 3], "tokens_weights": [1, 1, 1], "id": "x"}
PROMPT = {"prompt": [PIXELS], "target": [PIXELS], "label": 1, "fold": 2, "id": "x"}
IDS = {"prompt_ids": [1, 2, 3, 4], "target_ids": [1, 2, 3, 4], "label": 1, "fold": 2}
CASES = {
    "sentence": (lvm_format.Formatter(max_tokens=16), SENTENCE),
    "prompt": (prompts.Formatter(images=2, targets=1, side=8, size=4), PROMPT),
    "ids": (prompts.Formatter(images=2, targets=1, side=0, size=4), IDS),
    "encoded": (train_vqgan, {"jpg": PNG, "id": "x"}),
    "decoded": (train_vqgan, {"image_u8": PIXELS, "id": "x"}),
    "labels": (label, {"jpg": PNG, "labels": ["a"], "id": "x"}),
    "names": (label, {"image": PNG, "class_names": "a, b"}),
    "captions": (label, {"png": PNG, "captions": ["a dog"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_odd_value(case):
    formatter, good = CASES[case]
    formatter(good)
    for key in good:
        without = {name: value for name, value in good.items() if name != key}
        odd = [good | {key: value} for value in (*ODD, *([x] for x in ODD), {key: good[key]})]
        odd += [good | {value: 1} for value in (None, 3, b"x", 1.5)]
        for record in [without, *odd]:
            try:
                formatter(record)
            except records.DataError as error:
                assert len(str(error)) < 1000
