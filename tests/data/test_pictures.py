import numpy as np
import pytest

from vlm_jax.data import annotations, drawing, images, pictures


def save(path, image_u8):
    path.write_bytes(images.encode(image_u8))
    return str(path)


def test_pictures_are_read_resized_and_altered(tmp_path):
    red = np.zeros((8, 12, 3), np.uint8)
    red[..., 0] = 200
    path = save(tmp_path / "red.png", red)
    photo = pictures.Picture(path)
    marks = {
        "marks": drawing.Drawing("boxes", "black", {"r": [annotations.Thing(1, (0, 0, 11, 7))]})
    }
    reader = pictures.Reader(4, marks)
    plain, grey, drawn = reader.read(
        [photo, pictures.edited(photo, "grey"), pictures.Picture(path, drawn=("marks", "r"))]
    )
    assert plain.shape == (4, 4, 3) and plain.dtype == np.float32
    np.testing.assert_array_equal(plain, images.to01(images.resize(red, 4)))
    np.testing.assert_allclose(grey, 0.2989 * 200 / 255, atol=1e-6)  # not rounded to bytes
    assert drawn[0, 0, 0] > 0 and drawn[0, 0, 1] == 0


def test_an_edit_of_an_array_happens_at_once():
    white = np.full((16, 16, 3), 255, np.uint8)
    hidden = pictures.edited(white, "hide", 5)
    expected = pictures.holes(np.random.default_rng(5), 16, 16)
    assert hidden.dtype == np.uint8
    np.testing.assert_array_equal(hidden[..., 0] == 0, expected)


def test_holes_have_the_distribution_of_the_reference():
    rng = np.random.default_rng(0)
    sides, corners, kept = [], set(), []
    for _ in range(2500):
        hidden = pictures.holes(rng, 256, 256)
        blocks = hidden.reshape(8, 32, 8, 32).transpose(0, 2, 1, 3).reshape(64, 1024)
        if (blocks.all(1) | ~blocks.any(1)).all():  # whole patches of 32 x 32
            kept.append(1 - hidden.mean())
            continue
        rows, columns = np.nonzero(hidden.any(1))[0], np.nonzero(hidden.any(0))[0]
        sides.append(len(rows))
        assert len(rows) == len(columns) and hidden.sum() == len(rows) ** 2
        corners.add((rows[0], columns[0]))
    assert (min(sides), max(sides)) == (25, 127)  # [floor(0.1 * 256), floor(0.5 * 256))
    assert 73 < np.mean(sides) < 79  # uniform: 76
    assert 0.27 < len(sides) / 2500 < 0.33
    assert len(corners) > 0.9 * len(sides)
    # A rate of its own for every image: kept shares are uniform, with variance 1/12 + 1/6/64.
    assert abs(np.mean(kept) - 0.5) < 0.02 and abs(np.var(kept) - 0.0859) < 0.006
    kept = np.array(kept)
    low, middle, high = (np.mean((kept >= a) & (kept < a + 0.2)) for a in (0.0, 0.4, 0.8))
    assert all(0.15 < share < 0.25 for share in (low, middle, high))


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(images.ImageError, match="broken.png"):
        pictures.Reader(4).read([pictures.Picture(str(path))])
