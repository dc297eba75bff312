import io

import numpy as np
import pytest
from PIL import Image

from tests.evaluators import fakes
from vlm_jax import answer
from vlm_jax.data import images, records
from vlm_jax.evaluators import image_grid

SIDE = 8


def square(value):
    return np.full((SIDE, SIDE, 3), value, np.uint8)


def batches(count, size=4):
    """Row i: the prompt is of grey i, the truth of 255 - i."""
    for first in range(0, count, size):
        rows = range(first, min(first + size, count))
        hosts = [
            answer.Host(
                truth=answer.Answer(images=(images.to01(square(255 - i)),)),
                id=f"r{i}",
                images=(square(i),),
            )
            for i in rows
        ]
        yield fakes.batch_of({"n": np.array(rows)}, hosts, first=first)


class Reader:
    def read(self, outputs, batch):
        return [answer.Answer(images=(images.to01(square(100 + n)),)) for n in outputs["n"]]


def predict(batch):
    return {"n": batch.arrays["n"], "error": batch.arrays["n"].astype(np.float32)}


def test_rows_are_spread_over_all_of_the_data(tmp_path):
    evaluator = image_grid.Evaluator(rows=3, cell=SIDE)
    found = fakes.run(evaluator, batches(41), reader=Reader(), predict=predict, out_dir=tmp_path)
    assert found == {"n": 20.0, "error": 20.0}
    picture = np.array(Image.open(io.BytesIO((tmp_path / "samples.png").read_bytes())))
    greys = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    # Every eighth is held, 0 to 40; the first, the middle and the last are shown, with all three.
    for i in (0, 16, 40):
        for value in (i, 100 + i, 255 - i):
            assert (value, value, value) in greys, (i, value)


def test_few_pictures_are_held():
    spread = image_grid._Spread(8)
    for i in range(10_000):
        spread.add(i)
        assert len(spread._kept) <= 16
    chosen = spread.chosen()
    assert len(chosen) == 8 and chosen[0] == 0 and chosen[-1] > 9000
    gaps = np.diff(chosen)
    assert gaps.max() <= 2 * gaps.min()


def test_answers_without_images_are_refused():
    class Silent(Reader):
        def read(self, outputs, batch):
            return [answer.Answer(text="a dog") for _ in outputs["n"]]

    with pytest.raises(records.DataError, match="the answer about r0 has none; predict='continue'"):
        fakes.run(image_grid.Evaluator(), batches(2), reader=Silent(), predict=predict)
