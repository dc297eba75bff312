"""Scenes drawn on the device, palettes, and the tables they are kept in."""

import pickle

import numpy as np
import pytest

from vlm_jax.data import images, records
from vlm_jax.datasets import composed_scenes, few_shot, palette_scenes, picture_table, token_table


@pytest.fixture(scope="module")
def scenes(demo_data):
    return composed_scenes.Scenes("heldout", side=16, chunk=2, seed=3)


def drawn(scenes, kind, count=3):
    return np.concatenate(list(scenes.draw(kind, count)))


def test_masks_are_where_the_thing_is(scenes):
    pairs = drawn(scenes, "mask")
    assert pairs.shape == (3, 8, 16, 16, 3) and pairs.dtype == np.uint8
    masks = pairs[:, 1::2]
    assert set(np.unique(masks)) == {0, 255}
    share = (masks[..., 0] > 0).mean(axis=(2, 3))
    assert (share > 0).mean() > 0.9 and share.max() < 0.5  # sides of .3 to .65


def test_a_sentence_follows_from_its_number(scenes, demo_data):
    again = composed_scenes.Scenes("heldout", side=16, chunk=2, seed=3)
    np.testing.assert_array_equal(drawn(scenes, "photo", 4)[:3], drawn(again, "photo"))
    grey, photo = drawn(scenes, "photo")[:, 0::2], drawn(scenes, "photo")[:, 1::2]
    assert np.abs(images.grey_u8(photo).astype(int) - grey).max() <= 1  # of unrounded colours


def test_what_is_drawn_can_be_worked_on_at_once(scenes):
    got = np.concatenate(list(scenes.draw("photo", 3, lambda x: x.mean(axis=(2, 3, 4)))))
    np.testing.assert_allclose(got, drawn(scenes, "photo").mean(axis=(2, 3, 4)), rtol=1e-5)
    with pytest.raises(records.DataError, match="no scenes of kind .*'portrait'.*mask, box"):
        next(scenes.draw("portrait", 1))


def test_scenes_of_a_bank_of_ones_own():
    """A white thing on black ground: the scene shows where it is."""
    white = np.full((6, 4, 4), 255, np.uint8)
    bank = composed_scenes.bank_of_things([("thing", white)]) | {
        "grounds": np.zeros((1, 64, 64, 3), np.uint8),
        "photos": np.zeros((1, 64, 64, 3), np.uint8),
    }
    assert bank["things"].shape == (1, 64, 64, 4) and bank["odds"].shape == (0,)
    np.testing.assert_allclose(bank["extents"], [[1, 4 / 6]])
    pairs = np.concatenate(
        list(composed_scenes.Scenes("train", side=16, chunk=2, bank=bank).draw("mask", 4))
    )
    seen, marked = pairs[:, 0::2].max(-1) > 0, pairs[:, 1::2, ..., 0] > 0
    assert marked.any(axis=(2, 3)).all() and seen.any()
    filled = ~seen.any(axis=(2, 3))  # with a black photo
    np.testing.assert_array_equal(seen[~filled], marked[~filled])


def test_palettes_are_held_out():
    train, heldout = (set(map(tuple, palette_scenes.palettes(s))) for s in ("train", "heldout"))
    assert len(train) == 130 and len(heldout) == 26 and not train & heldout
    assert all(thing != ground for thing, ground in train | heldout)


def test_two_colours():
    image01 = np.full((1, 2, 3), 0.5, np.float32)
    inside = np.array([[True, False]])
    got = palette_scenes.paint(image01, inside, np.array([1.0, 0, 0]), np.array([0, 0, 1.0]))
    light = 0.15 + 0.85 * 0.5 * sum(images.GREY_WEIGHTS)
    np.testing.assert_allclose(got, [[[light, 0, 0], [0, 0, light]]], rtol=1e-5)


def test_scenes_of_one_palette_make_examples(demo_data):
    queries = dict(type="palette_scenes", split="heldout", count=8, size=16, per_palette=4)
    source = palette_scenes.PaletteScenes("heldout", count=8, size=16, per_palette=4)
    assert source.labels.tolist() == [source.labels[0]] * 4 + [source.labels[4]] * 4
    prompts = few_shot.FewShot(queries, "colour", shots=3)
    prompt = prompts[5]
    answers = [source[i]["image_u8"] for i in (4, 6, 7)]
    for shown in prompt["prompt"][1::2]:
        assert any(np.array_equal(shown, answer) for answer in answers)
    assert prompt["label"] == source.labels[5]


def test_table_of_tokens(tmp_path):
    path = tmp_path / "mask.npy"
    np.save(path, np.arange(24, dtype=np.uint16).reshape(3, 8))
    table = pickle.loads(pickle.dumps(token_table.TokenTable(str(path), 2, question_weight=0.25)))
    assert len(table) == 3
    record = table[1]
    assert record["tokens"].tolist() == list(range(8, 16)) and record["tokens"].dtype == np.int32
    assert record["tokens_weights"].tolist() == [0.25, 0.25, 1, 1, 0.25, 0.25, 1, 1]
    assert "tokens_weights" not in token_table.TokenTable(str(path), 2)[1]
    for index, record in zip((2, 0), table.read_many(np.array([2, 0])), strict=True):
        assert record.keys() == table[index].keys() and record["id"] == table[index]["id"]
        for key in ("tokens", "tokens_weights"):
            np.testing.assert_array_equal(record[key], table[index][key])
    assert table.fingerprint()
    for wrong, message in [(3, r"uint16\[3, 8\] is no table"), (0, "tokens_per_image=0")]:
        with pytest.raises(records.DataError, match=message):
            token_table.TokenTable(str(path), wrong)
    with pytest.raises(records.DataError, match="missing.npy"):
        token_table.TokenTable(str(tmp_path / "missing.npy"), 2)


def test_table_of_pictures(tmp_path):
    path = tmp_path / "pictures.npy"
    pictures = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    np.save(path, pictures)
    table = pickle.loads(pickle.dumps(picture_table.PictureTable(str(path))))
    assert len(table) == 2
    np.testing.assert_array_equal(table[1]["image_u8"], pictures[1])
    np.save(path, pictures[0])
    with pytest.raises(records.DataError, match=r"uint8\[2, 2, 3\] is not uint8\[N, H, W, 3\]"):
        picture_table.PictureTable(str(path))
