"""Boxes and masks of expressions, against numbers worked out by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.evaluators import fakes
from vlm_jax import answer
from vlm_jax.data import annotations, records
from vlm_jax.evaluators import grounding

SIZE = (40, 60)


def mask(x0, y0, x1, y1):
    inside = np.zeros(SIZE, bool)
    inside[y0:y1, x0:x1] = True
    return annotations.encode_rle(inside)


def place(*box, masks=True):
    return answer.Answer(boxes_xyxy_px=[box], masks=(mask(*box),) if masks else ())


NOTHING = answer.Answer()
TRUE = [place(0, 0, 20, 20), place(20, 0, 40, 20), place(10, 10, 50, 30), NOTHING, NOTHING]
TWO = answer.Answer(boxes_xyxy_px=[[10, 10, 50, 30], [0, 0, 5, 5]],
                    masks=(mask(10, 10, 50, 30), mask(0, 0, 5, 5)))  # fmt: skip
SAID = [place(0, 0, 20, 15), NOTHING, TWO, place(0, 0, 10, 10), NOTHING]


def run(true, said, out_dir=None, *, size=SIZE, images=(), **fields):
    hosts = [answer.Host(truth=x, id=f"r{i}", size=size, images=images) for i, x in enumerate(true)]
    batch = fakes.batch_of({"ids": np.arange(len(true))}, hosts)

    class Reader:
        def read(self, outputs, batch):
            return said

    evaluator = grounding.Evaluator(predict="boxes", **fields)
    evaluator.check(batch)
    return fakes.run(evaluator, [batch], reader=Reader(), predict=lambda b: {}, out_dir=out_dir)


def test_scores_by_hand(tmp_path):
    photo = np.full((*SIZE, 3), 200, np.uint8)
    found = run(TRUE, SAID, tmp_path, images=(photo,))
    # IoUs of boxes: 300 / 400, nothing, 1.
    assert found["box_iou"] == pytest.approx((0.75 + 0 + 1) / 3)
    assert found["acc_50"] == pytest.approx(2 / 3)
    assert found["acc_75"] == found["acc_90"] == pytest.approx(1 / 3)  # above, not at
    # Masks: 300 / 400, 0 / 400, 800 / 800, 0 / 100 of a false alarm, nothing of nothing.
    assert found["ciou"] == pytest.approx((300 + 800) / (400 + 400 + 800 + 100))
    assert found["giou"] == pytest.approx((0.75 + 0 + 1 + 0 + 1) / 5)
    assert found["nothing_said"] == found["several_said"] == pytest.approx(1 / 3)
    assert found["false_alarm"] == 0.5 and found["unreadable"] == 0 and found["images"] == 5
    for name in ("acc_50", "ciou", "giou"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    lines = [json.loads(x) for x in (tmp_path / "locations.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["r0", "r1", "r2", "r3", "r4"]
    assert answer.Answer.from_json(lines[2]["answer"]) == TWO
    drawn = np.array(Image.open(tmp_path / "locations.png"))
    assert (drawn == (220, 0, 0)).all(-1).any() and (drawn == (0, 170, 0)).all(-1).any()


def test_several_places_count_as_none_where_the_paper_says_so():
    found = run(TRUE, SAID, several="none")
    assert found["acc_50"] == pytest.approx(1 / 3)
    assert found["ciou"] == pytest.approx(300 / (400 + 400 + 800 + 100))


def test_guesses_without_an_image():
    """The box in the middle of half the sides is 15 10 45 30; the mean is that of the truth."""
    true = [place(15, 10, 45, 30, masks=False), place(0, 0, 60, 40, masks=False)]
    found = run(true, [NOTHING, NOTHING])
    assert found["centre_acc_50"] == 0.5 and found["acc_50"] == 0
    assert found["centre_box_iou"] == pytest.approx((1 + 0.25) / 2)
    # 7.5 5 52.5 35: 1350 of 2400, and 600 of 1350.
    assert found["mean_box_iou"] == pytest.approx((600 / 1350 + 1350 / 2400) / 2)
    assert "ciou" not in found


def test_boxes_the_wrong_way_round_and_beyond_the_edges():
    true = [place(0, 0, 20, 20, masks=False)] * 2
    back = answer.Answer(boxes_xyxy_px=[[20, 20, 0, 0]])
    wide = answer.Answer(boxes_xyxy_px=[[-20, 0, 20, 20]])
    assert run(true, [back, wide])["box_iou"] == pytest.approx((0 + 0.5) / 2)


def test_answers_that_could_not_be_read_are_counted():
    broken = answer.Answer(problem="ends within a location")
    found = run(TRUE[:2], [broken, SAID[0]])
    assert found["unreadable"] == 0.5 and found["nothing_said"] == 0.5


@pytest.mark.parametrize("true, message", [
    ([TWO], "r0 has 2 true boxes"),
    ([], "no usable example"),
])  # fmt: skip
def test_data_that_are_refused(true, message):
    with pytest.raises(records.DataError, match=message):
        run(true, [NOTHING] * len(true))


def test_masks_of_another_size_are_refused():
    other = answer.Answer(masks=(annotations.encode_rle(np.ones((3, 3), bool)),))
    with pytest.raises(records.DataError, match=r"a mask of \(3, 3\) for an image of \(40, 60\)"):
        run([TRUE[0]], [other])


def test_an_unknown_rule():
    with pytest.raises(ValueError, match="several='all'"):
        grounding.Evaluator(predict="boxes", several="all")
