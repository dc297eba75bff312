"""What costs no tokenizer, beside what one gives."""

import numpy as np
import pytest

from tests.evaluators import fakes
from vlm_jax.evaluators import reconstruction


def scores_of(image01, num_ids):
    outputs = {
        "image01": image01,
        "recon01": image01,
        "ids": np.zeros((len(image01), num_ids), int),
    }
    batch = fakes.batch_of({"image01": image01})
    return fakes.run(reconstruction.Evaluator(codes=2), [batch], predict=lambda batch: outputs)


def test_flat_and_thumbnail():
    # Four squares of 4x4: as many pixels as ids hold them, up to bicubic edges.
    squares = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)
    image01 = np.kron(squares, np.ones((4, 4), np.float32))[None, ..., None].repeat(3, axis=-1)
    scores = scores_of(image01, 4)
    assert scores["flat_psnr"] == pytest.approx(-10 * np.log10(0.25))
    assert scores["thumbnail_psnr"] > scores["flat_psnr"] + 3
    assert scores["psnr"] == pytest.approx(100)
    even = scores_of(np.full((1, 8, 8, 3), 0.2, np.float32), 4)
    assert even["flat_psnr"] == even["psnr"] == pytest.approx(100)
    assert even["thumbnail_psnr"] == pytest.approx(100)  # 0.2 is 51 / 255
