import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.evaluators import fakes
from tests.evaluators.fakes import gray
from vlm_jax import answer
from vlm_jax.data import images, records
from vlm_jax.evaluators import generation


class Predict:
    """Every call gives the next two ids, so that candidates differ."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        return {"ids": np.full((len(batch.valid), 1), self.calls)}


READER = fakes.Reader([images.to01(gray([v, v], [v, v])) for v in (0, 51, 102)])


def batch(**fields):
    return fakes.prompt_batch(
        [[gray([7, 7], [7, 7])]] * 2, [gray([0, 0], [0, 0])] * 2, names=["a.png", "b/c"], **fields
    )


def test_tiles_names_and_errors(tmp_path):
    predict = Predict()
    evaluator = generation.Evaluator(candidates=2, show_inputs=True)
    scores = fakes.run(evaluator, [batch()], reader=READER, predict=predict, out_dir=tmp_path)
    assert predict.calls == 2  # one per candidate, not one per prompt
    sheet = np.array(Image.open(tmp_path / "a.png"))[..., 0]
    one, two = [7, 7, 51, 51], [7, 7, 102, 102]
    np.testing.assert_array_equal(sheet, [one, one, two, two])
    other = np.array(Image.open(tmp_path / "b" / "c.png"))[..., 0]
    np.testing.assert_array_equal(other, [one, one, two, two])
    assert scores["pictures"] == 2
    assert scores["mse"] == pytest.approx((0.2**2 + 0.4**2) / 2)
    assert scores["mse_x3"] == pytest.approx(3 * (0.2**2 + 0.4**2) / 2)


@pytest.mark.parametrize("spec, size", [("", (2, 2)), ("original", (6, 4)), ("5,3", (5, 3))])
def test_sizes(tmp_path, spec, size):
    evaluator = generation.Evaluator(candidates=1, resize_output=spec)
    fakes.run(evaluator, [batch()], reader=READER, predict=Predict(), out_dir=tmp_path)
    assert Image.open(tmp_path / "a.png").size == size


def test_without_targets_there_is_no_error_and_filling_rows_are_not_written(tmp_path):
    made = batch(valid=[True, False])
    made.hosts = [dataclasses.replace(host, truth=answer.Answer()) for host in made.hosts]
    evaluator = generation.Evaluator(candidates=1)
    scores = fakes.run(evaluator, [made], reader=READER, predict=Predict(), out_dir=tmp_path)
    assert scores == {"pictures": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="candidates=0"):
        generation.Evaluator(candidates=0)
    with pytest.raises(ValueError, match="WIDTH,HEIGHT"):
        generation.Evaluator(resize_output="big")
    made = batch()
    made.hosts[0] = dataclasses.replace(made.hosts[0], output="../x.png")
    with pytest.raises(records.DataError, match="leaves"):
        fakes.run(
            generation.Evaluator(), [made], reader=READER, predict=Predict(), out_dir=tmp_path
        )


def test_records_that_name_no_output_are_counted(tmp_path):
    made = batch()
    made.hosts = [dataclasses.replace(host, output="", id="../etc/x") for host in made.hosts]
    made.rows = made.rows + 40
    evaluator = generation.Evaluator(candidates=1)
    fakes.run(evaluator, [made], reader=READER, predict=Predict(), out_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000040.png", "000041.png"]
