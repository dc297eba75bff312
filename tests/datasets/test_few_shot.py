import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import images, records, sources
from vlm_jax.datasets import few_shot


def memory(count, **more):
    """Images of one value, 10 x number."""
    return dict(
        type="memory",
        records=[
            {"image_u8": np.full((2, 3, 3), 10 * i, np.uint8), "id": f"m{i}", **more}
            for i in range(count)
        ],
    )


def make(**fields):
    return sources.make_source(type="few_shot", **fields)


def test_colorization():
    source = make(queries=memory(4), answer="colour", shots=2)
    record = source[2]
    assert len(source) == 4 and record["id"] == "m2" and record["label"] == -1
    values = [int(x[0, 0, 0]) for x in record["prompt"]]
    assert values[4] == 20 and values[0] == values[1] and values[2] == values[3]
    assert {values[0], values[2]} < {0, 10, 30} and len({values[0], values[2]}) == 2
    np.testing.assert_array_equal(record["target"][0], np.full((2, 3, 3), 20))
    coloured = make(
        queries=memory(2, image_u8=np.full((2, 2, 3), [255, 0, 0], np.uint8)),
        shots=1,
        answer="colour",
    )[0]
    np.testing.assert_array_equal(coloured["prompt"][0], images.grey_u8(coloured["prompt"][1]))


def test_masks_boxes_and_pictures():
    masks = np.zeros((2, 2, 3), bool)
    masks[0, 0, 0] = masks[1, 1, 1] = True
    answer = make(queries=memory(2, masks=masks), answer="mask")[0]["target"][0]
    np.testing.assert_array_equal(answer[..., 2], [[255, 0, 0], [0, 255, 0]])
    answer = make(queries=memory(2, masks=masks), answer="box")[0]["target"][0]
    np.testing.assert_array_equal(answer[..., 2], [[255, 255, 0], [255, 255, 0]])
    shown = np.full((2, 3, 3), 77, np.uint8)
    answer = make(queries=memory(2, answer_u8=shown), answer="picture")[0]["target"][0]
    np.testing.assert_array_equal(answer, shown)
    empty = make(queries=memory(2, masks=np.zeros((1, 2, 3), bool)), answer="mask")
    with pytest.raises(records.BadRecordError, match="mask is empty"):
        empty[0]
    np.testing.assert_array_equal(few_shot.paint(masks[0])[0, :, 0], [255, 0, 0])


def test_examples_of_their_own_may_be_the_same_number():
    source = make(queries=memory(3), examples=memory(1), answer="colour")
    assert [int(source[i]["prompt"][0][0, 0, 0]) for i in range(3)] == [0, 0, 0]


def test_bad_fields():
    with pytest.raises(records.DataError, match="answer='depth'"):
        make(queries=memory(3), answer="depth")
    with pytest.raises(records.DataError, match="3 records cannot give 3 examples"):
        make(queries=memory(3), answer="colour", shots=3)
    with pytest.raises(records.DataError, match="shots=0"):
        make(queries=memory(3), answer="colour", shots=0)


def test_image_folder(tmp_path):
    for name in ("b/2.png", "b/10.png", "a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2)).save(tmp_path / name)
    source = sources.make_source(type="image_folder", path=str(tmp_path))
    assert [source.record_id(i) for i in range(3)] == ["a.png", "b/2.png", "b/10.png"]
    assert source[1]["image_u8"].shape == (2, 3, 3)
    drawn = sources.make_source(type="image_folder", path=str(tmp_path), limit=2)
    assert len(drawn) == 2
    with pytest.raises(records.DataError, match="no such folder"):
        sources.make_source(type="image_folder", path=str(tmp_path / "none"))


@pytest.mark.parametrize("answer", few_shot.ANSWERS)
def test_records_without_what_is_shown_are_bad(answer):
    for record in ({"id": "x"}, {"id": "x", "image_u8": "no array"}):
        source = make(
            queries={"type": "memory", "records": [record, record]}, answer=answer, shots=1
        )
        with pytest.raises(records.BadRecordError):
            source[0]
    if answer != "colour":
        with pytest.raises(records.BadRecordError, match="among"):
            make(queries=memory(2), answer=answer)[0]
