import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests import fuzz
from vlm_jax.data import images


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, **({"format": "png"} | options))
    return stream.getvalue()


def gradient(height=6, width=8):
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 20, x * 20, y + x], -1).astype(np.uint8)


def png_of_size(width, height):
    """A valid PNG header and nearly no data: what a decompression bomb looks like."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def test_resize_is_the_reference(golden_lvm):
    golden = np.load(golden_lvm / "io.npz")
    resized = images.resize(golden["prep.src_u8"], 256)
    assert resized.shape == (256, 256, 3)
    np.testing.assert_array_equal(resized[:64], golden["prep.resized256_rows0_63_u8"])
    np.testing.assert_array_equal(resized[192:], golden["prep.resized256_rows192_255_u8"])


def test_decode_then_resize_is_the_reference(golden_lvm):
    golden = np.load(golden_lvm / "io.npz")
    decoded = images.decode(images.encode(golden["prep.src_u8"]))
    np.testing.assert_array_equal(decoded, golden["prep.src_u8"])


def test_grey_is_the_reference(golden_lvm):
    golden = np.load(golden_lvm / "io.npz")
    grey = images.grey(images.to01(golden["vq.images_u8"][golden["prep.gray_src_index"]]))
    assert grey.dtype == np.float32
    for channel in range(3):
        np.testing.assert_allclose(grey[..., channel], golden["prep.gray"], atol=1e-6)


def test_bytes_and_floats():
    image = gradient()
    np.testing.assert_array_equal(images.to_u8(images.to01(image)), image)
    values = np.array([-0.5, 0.5, 0.999, 2.0], np.float32)
    np.testing.assert_array_equal(images.to_u8(values), [0, 128, 255, 255])
    np.testing.assert_array_equal(images.to_u8(values, truncate=True), [0, 127, 254, 255])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(gradient()).convert(mode)
    options = {"format": "tiff"} if mode in ("CMYK", "YCbCr") else {}
    decoded = images.decode(encoded(image, **options))
    assert decoded.shape == (6, 8, 3) and decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, np.array(image.convert("RGB")))


def test_16_bit_grey_keeps_the_high_byte():
    wide = np.array([[0, 255, 256, 65535]], np.uint16)
    decoded = images.decode(encoded(Image.fromarray(wide)))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 255]


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    content = encoded(Image.fromarray(gradient(6, 8)), exif=exif)
    np.testing.assert_array_equal(images.decode(content), np.rot90(gradient(6, 8), -1))


def test_bomb_is_refused_from_its_header():
    with pytest.raises(images.ImageError, match=r"bomb\.png: .*20000.*"):
        images.decode(png_of_size(20_000, 10_000), name="bomb.png")
    # Under Pillow's own limit, ours counts.
    with pytest.raises(images.ImageError, match="10000x8000 = 80000000 pixels is over the limit"):
        images.decode(png_of_size(10_000, 8_000))


def test_truncated_image(tmp_path):
    path = tmp_path / "half.jpg"
    content = encoded(Image.fromarray(np.tile(gradient(), (20, 20, 1))), format="jpeg")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(images.ImageError, match=r"half\.jpg: .*truncated"):
        images.decode(path)


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 99]
)
def test_other_bytes_are_not_images(content):
    with pytest.raises(images.ImageError, match="x.bin: not an image of a supported format"):
        images.decode(content, name="x.bin")


def test_missing_file_and_damaged_header(tmp_path):
    with pytest.raises(images.ImageError, match="nowhere.png: cannot read: No such file"):
        images.decode(tmp_path / "nowhere.png")
    good = encoded(Image.fromarray(gradient()))
    for place in range(8, len(good), 5):  # one flipped byte: an image or an ImageError
        damaged = good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :]
        try:
            assert images.decode(damaged).ndim == 3
        except images.ImageError as error:
            assert str(len(good)) in str(error)


def _files():
    """A small file of every format and kind of pixel that is read."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a text"
    files = {
        "palette.png": encoded(photo.convert("P"), exif=exif),
        "wide.png": encoded(Image.fromarray(np.arange(480, dtype=np.uint16).reshape(24, 20))),
        "photo.jpg": encoded(photo, format="jpeg", exif=exif),
        "progressive.jpg": encoded(photo, format="jpeg", progressive=True),
        "lzw.tiff": encoded(photo, format="tiff", compression="tiff_lzw"),
        "plain.tiff": encoded(photo.convert("CMYK"), format="tiff"),
    }
    for suffix in ("webp", "gif", "bmp", "ppm", "jpeg2000", "ico", "avif"):
        if suffix.upper() in Image.SAVE and suffix.upper() in Image.OPEN:
            files[suffix] = encoded(photo, format=suffix)
    return files


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged tags
def test_mutated_files_are_pictures_or_named_errors():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Image.init()
    for name, content in _files().items():
        for damaged in fuzz.mutations(content, 60):
            try:
                found = images.decode(damaged, name=name)
            except images.ImageError as error:
                assert str(error).startswith(f"{name}: ")
            else:
                assert found.dtype == np.uint8 and found.shape[2] == 3
                assert found.size <= 3 * images.MAX_PIXELS
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert used < 2**20  # KiB


def test_a_small_file_of_a_large_picture_is_read_within_its_bound():
    # 16 bits a pixel: the copies of the whole picture that made gigabytes of it are gone.
    content = encoded(Image.new("I;16", (3000, 2000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert images.decode(content).shape == (2000, 3000, 3)
    used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert used < 10 * 6_000_000
    # Decoders that hold several copies have a lower limit of pixels.
    with pytest.raises(images.ImageError, match="over the limit of 50 for WEBP"):
        images.decode(encoded(Image.new("RGB", (9, 9)), format="webp"), max_pixels=100)


def test_an_icon_that_holds_a_larger_picture():
    inside = png_of_size(11_000, 11_000)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 64, 64, 0, 0, 1, 32, len(inside), 22) + inside
    with pytest.raises(images.ImageError, match="an icon of 11000x11000 pixels"):
        images.decode(icon)
    assert images.decode(encoded(Image.new("RGB", (64, 64)), format="ico")).shape == (64, 64, 3)


def test_squares_and_crops():
    image = gradient(6, 8)
    np.testing.assert_array_equal(images.crop_square(image), image[:, 1:7])
    padded = images.pad_square(image, 9)
    assert padded.shape == (8, 8, 3) and (padded[0] == 9).all()
    np.testing.assert_array_equal(padded[1:7], image)
    rng = np.random.default_rng(0)
    sides = {images.random_crop(image, rng, min_side=4).shape for _ in range(50)}
    assert sides == {(4, 4, 3), (5, 5, 3), (6, 6, 3)}


def test_grid_places_images_and_labels():
    red, blue = np.zeros((2, 4, 4, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    plain = images.draw_grid([[red, blue], [None, red]], cell=8, gap=2)
    assert plain.shape == (2 + 2 * 10, 2 + 2 * 10, 3)
    assert plain[2:10, 2:10].reshape(-1, 3).tolist() == [[255, 0, 0]] * 64
    assert (plain[12:20, 2:10] == 255).all() and plain[12, 12].tolist() == [255, 0, 0]
    labelled = images.draw_grid(
        [[red, blue]], column_labels=["context image", "b"], row_labels=["row"], cell=64
    )
    assert labelled.shape[0] > 64 + 13 and labelled.shape[1] > 2 * 64 + 20
    assert (labelled[:14] < 128).any()  # ink above the columns


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_is_read_quietly():
    palette = Image.fromarray(gradient()).convert("P")
    plain, see_through = encoded(palette), encoded(palette, transparency=bytes(range(256)))
    np.testing.assert_array_equal(images.decode(see_through), images.decode(plain))
