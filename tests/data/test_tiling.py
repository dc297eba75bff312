import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import records, tiling


def flat(value, height=1, width=2):
    return np.full((height, width, 3), value, np.uint8)


def test_candidates_below_each_other_frames_side_by_side():
    sheet = tiling.tile([[flat(1), flat(2)], [flat(3), flat(4)]])
    np.testing.assert_array_equal(sheet[..., 0], [[1, 1, 2, 2], [3, 3, 4, 4]])
    sheet = tiling.tile([[flat(1)], [flat(3)]], [flat(8), flat(9)])
    np.testing.assert_array_equal(sheet[..., 0], [[8, 8, 9, 9, 1, 1], [8, 8, 9, 9, 3, 3]])


def test_every_image_is_resized():
    sheet = tiling.draw([[flat(1), flat(2)]], [flat(7, 5, 5)], size=(2, 3))
    assert sheet.shape == (2, 9, 3)
    np.testing.assert_array_equal(sheet[0, :, 0], [7, 7, 7, 1, 1, 1, 2, 2, 2])
    # Without a size the inputs take that of what was made.
    assert tiling.draw([[flat(1)]], [flat(7, 5, 5)]).shape == (1, 4, 3)


def test_output_size():
    assert tiling.output_size("", (10, 20)) is None
    assert tiling.output_size("original", np.array([10, 20])) == (10, 20)
    assert tiling.output_size("320, 240", (1, 1)) == (240, 320)
    with pytest.raises(records.DataError, match="more than 67108864 pixels"):
        tiling.output_size("99999,99999", (1, 1))
    for spec in ("320", "0,5", "a,b", "Original"):
        with pytest.raises(records.DataError, match="WIDTH,HEIGHT"):
            tiling.output_size(spec, (1, 1))


def test_outputs_stay_in_their_folder(tmp_path):
    assert tiling.place(tmp_path, "a/b.jpg") == tmp_path / "a" / "b.jpg"
    assert tiling.place(tmp_path, "bare") == tmp_path / "bare.png"
    for output in ("../b.png", "a/../../b.png", "/etc/b.png"):
        with pytest.raises(records.DataError, match="leaves"):
            tiling.place(tmp_path, output)
        tiling.place(tmp_path, output, anywhere=True)
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(records.DataError, match="leaves"):
        tiling.place(tmp_path, "link/b.png")
    for output in (".", "..", "", "/", "./", "a/.."):
        for anywhere in (False, True):
            with pytest.raises(records.DataError, match="names no file"):
                tiling.place(tmp_path, output, anywhere=anywhere)


def test_files(tmp_path):
    tiling.save(tmp_path / "x" / "a.png", flat(5))
    assert Image.open(tmp_path / "x" / "a.png").size == (2, 1)
    tiling.save(tmp_path / "a.jpg", flat(5))
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
    with pytest.raises(records.DataError, match="end with"):
        tiling.save(tmp_path / "a.exe", flat(5))


@pytest.mark.parametrize("output", ["a\0b", "n" * 300, "d/" + "n" * 10**6 + "/x.png", "\ud800"])
def test_names_that_no_file_has(tmp_path, output):
    for anywhere in (False, True):
        with pytest.raises(records.DataError, match="names no file") as caught:
            tiling.place(tmp_path, output, anywhere=anywhere)
        assert len(str(caught.value)) < 200


def test_suffixes_show_before_anything_is_made(tmp_path):
    with pytest.raises(records.DataError, match="outputs end with"):
        tiling.place(tmp_path, "a.exe")
