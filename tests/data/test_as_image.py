"""The gate for pictures: equal pixels are equal arrays, whatever they come in."""

import http.server
import io
import os
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms

from vlm_jax.data import image_files, images, records, web
from vlm_jax.encoders import image_tokenizer

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
GREY = RGB[..., :1]


def file_of(image, format="png", **options):
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def torch_of(array):
    return pytest.importorskip("torch").from_numpy(np.ascontiguousarray(array))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: RGB,
        lambda: np.asfortranarray(RGB),
        lambda: RGB / np.float32(255),
        lambda: RGB / 255.0,
        lambda: RGB.astype(np.uint16) << 8,
        lambda: np.dstack([RGB, GREY]),
        lambda: jnp.asarray(RGB),
        lambda: jnp.asarray(RGB / np.float32(255)),
        lambda: torch_of(RGB),
        lambda: torch_of(RGB / np.float32(255)).requires_grad_(),
        lambda: Image.fromarray(RGB),
        lambda: Image.fromarray(RGB).convert("RGBA"),
        lambda: Image.fromarray(RGB).convert("RGBX"),
        lambda: file_of(Image.fromarray(RGB)),
        lambda: memoryview(file_of(Image.fromarray(RGB), "bmp")),
    ],
)
def test_equal_pixels_are_equal(wrap):
    found = images.as_image(wrap())
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, RGB)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: GREY,
        lambda: GREY[..., 0],
        lambda: GREY[..., 0] / 255.0,
        lambda: GREY[..., 0].astype(np.uint16) * 257,
        lambda: torch_of(GREY),
        lambda: Image.fromarray(GREY[..., 0]),
        lambda: Image.fromarray(GREY[..., 0].astype(np.uint16) * 257),
        lambda: Image.fromarray(GREY[..., 0].astype(np.int32) * 257),
        lambda: Image.fromarray(GREY[..., 0] / np.float32(255)),
        lambda: Image.fromarray(GREY[..., 0]).convert("LA"),
    ],
)
def test_grey_has_three_equal_channels(wrap):
    np.testing.assert_array_equal(images.as_image(wrap()), np.repeat(GREY, 3, 2))


def test_booleans_and_half_precision():
    mask = GREY[..., 0] > 128
    expected = np.repeat(mask[..., None], 3, 2) * np.uint8(255)
    for kind in (mask, torch_of(mask), jnp.asarray(mask), Image.fromarray(mask)):
        np.testing.assert_array_equal(images.as_image(kind), expected)
    for half in (jnp.asarray(mask, jnp.bfloat16), torch_of(mask).bfloat16(), np.float16(mask)):
        np.testing.assert_array_equal(images.as_image(half), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"])
def test_a_pil_image_is_what_its_file_is(mode):
    image = Image.fromarray(RGB)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.convert("RGBA" if mode == "RGBa" else "P" if mode == "PA" else mode)
        image = image.convert(mode)
    found = images.as_image(image)
    assert found.shape == (6, 5, 3)
    if mode in ("LAB", "RGBa", "YCbCr", "HSV"):
        assert np.abs(found.astype(int) - RGB).max() < 24  # through and back, rounded
    if mode not in ("RGBa", "PA", "HSV"):
        content = file_of(image, "tiff")
        np.testing.assert_array_equal(found, images.as_image(content))
        np.testing.assert_array_equal(found, images.as_image(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_as_pillow_turns_them(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(Image.fromarray(RGB), exif=exif)
    opened = Image.open(io.BytesIO(content))
    turns = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(RGB),
    }
    for kind in (content, opened, opened.convert("RGB")):
        np.testing.assert_array_equal(images.as_image(kind), turns[orientation])


def test_strips_join(monkeypatch):
    monkeypatch.setattr(image_files, "_STRIP", 10)  # two rows of five pixels
    np.testing.assert_array_equal(images.as_image(Image.fromarray(RGB)), RGB)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (RGB.transpose(2, 0, 1), r"shape \[3, 6, 5\] is \[C, H, W\]; give \[H, W, C\]"),
        (GREY.transpose(2, 0, 1), r"\[1, 6, 5\] is \[C, H, W\]"),
        (RGB[None], r"shape \[1, 6, 5, 3\] is none of"),
        (RGB[..., :2], r"shape \[6, 5, 2\] is none of"),
        (RGB[0, 0], "is none of"),
        (RGB.astype(np.float32), "values from 0 to 248; a picture is uint8, or float in 0..1"),
        (RGB / 127.5 - 1, "values from -1 to .*; a picture"),
        (np.full((2, 2), np.nan), "values from nan to nan"),
        (RGB.astype(np.int64), "int64 has no defined range"),
        (np.full((2, 2), "a"), "has no defined range"),
        (np.zeros((0, 5, 3), np.uint8), r"an empty picture, shape \[0, 5, 3\]"),
        (Image.new("RGB", (0, 4)), "an empty picture, 0x4"),
        (Image.fromarray(np.full((2, 2), 7, np.float32)), "values from 7 to 7"),
        (Image.fromarray(np.full((2, 2), 70_000, np.int32)), "70000 are not in 0..65535"),
        (b"", "not an image"),
        (None, "a NoneType is no picture; give a path"),
        (7, "an? int is no picture"),
        ([RGB], "a list is no picture"),
        ("gone.png", "gone.png: cannot read: No such file"),
        ("a\0b.png", "cannot read: embedded null byte"),
        ("", "cannot read"),
        (".", "is a folder, not a file"),
        ("/dev/zero", "is a pipe, socket or device, not a file"),
        ("file://elsewhere/a.png", "names the host 'elsewhere'"),
        ("s3://bucket/a.png", "s3:// is not read; give a file"),
        ("data:image/png;base64," + "A" * 10**6, "^.{80}: data: is not read"),
        ("a" * 10**6, r"^a{80}\.\.\.: 1000000 characters are no name"),
        (np.ma.masked_array(RGB, RGB > 100), "masked values; fill them first"),
        (jax.random.key(0), "gives no plain values"),
        (Image.fromarray(RGB).convert("I"), "of 32 bits, with values up to .*Say it"),
        (io.StringIO("a"), "an open file must be binary"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_reason(value, message):
    with pytest.raises(images.ImageError, match=message):
        images.as_image(value)


def test_pictures_that_are_being_traced():
    with pytest.raises(images.ImageError, match="gives no plain values"):
        jax.jit(images.as_image)(jnp.ones((2, 2)))


def test_open_files_are_read_and_stay_open(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    with path.open("rb") as file:
        np.testing.assert_array_equal(images.as_image(file), RGB)
        file.seek(0)
        listed, single = images.one_or_many(file)
        assert single and listed == [file]
    with pytest.raises(images.ImageError, match="cannot read: .*closed"):
        images.as_image(file)
    np.testing.assert_array_equal(images.as_image(io.BytesIO(path.read_bytes())), RGB)


def test_arrays_that_are_views_of_others():
    np.testing.assert_array_equal(images.as_image(np.ma.masked_array(RGB)), RGB)
    np.testing.assert_array_equal(images.as_image(RGB[::-1, ::-1, ::-1]), RGB[::-1, ::-1, ::-1])


def test_tensors_of_torch_without_plain_values():
    torch = pytest.importorskip("torch")
    for tensor in (torch_of(RGB).to_sparse(), torch.zeros(2, 2, device="meta")):
        with pytest.raises(images.ImageError, match="a Tensor gives no plain values"):
            images.as_image(tensor)
    negative = torch.full((2, 2), -1.0).to(torch.complex64).mul(1j).conj().imag
    assert negative.is_neg()
    np.testing.assert_array_equal(images.as_image(negative), np.full((2, 2, 3), 255))


def test_dark_pictures_of_16_bits(tmp_path):
    Image.fromarray(np.full((2, 2), 200, np.uint16)).save(tmp_path / "a.png")
    assert not images.as_image(tmp_path / "a.png").any()  # the high byte
    assert not images.as_image(Image.fromarray(np.zeros((2, 2), np.int32))).any()


def test_files_of_any_name(tmp_path, monkeypatch):
    for name in (b"12:30.png", b"\xff\xe9.png", "東京 #1%.png".encode()):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as stream:
            stream.write(file_of(Image.fromarray(RGB)))
        np.testing.assert_array_equal(images.as_image(os.fsdecode(path)), RGB)
    np.testing.assert_array_equal(images.as_image((tmp_path / "東京 #1%.png").as_uri()), RGB)
    monkeypatch.setenv("HOME", str(tmp_path))
    np.testing.assert_array_equal(images.as_image("~/12:30.png"), RGB)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(images.ImageError, match="pipe.png: is a pipe"):
        images.as_image(tmp_path / "pipe.png")


class _Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answers = {
            "/a.png": (200, {}, file_of(Image.fromarray(RGB))),
            "/there": (302, {"Location": "/a.png"}, b""),
            "/file": (302, {"Location": "file:///etc/passwd"}, b""),
            "/ftp": (302, {"Location": "ftp://127.0.0.1/a"}, b""),
            "/html": (200, {}, b"<html>"),
            "/short": (200, {"Content-Length": "99999"}, file_of(Image.fromarray(RGB))),
        }
        if self.path == "/slow":
            self.server.gone.wait(5)
            return
        code, headers, body = answers.get(self.path, (404, {}, b""))
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    server.gone = threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.gone.set()
    server.shutdown()
    server.server_close()


def test_urls_within_bounds(site, monkeypatch):
    np.testing.assert_array_equal(images.as_image(f"{site}/a.png"), RGB)
    np.testing.assert_array_equal(images.as_image(f"{site}/there"), RGB)
    for path, cause in (
        ("gone", "cannot read: HTTP Error 404"),
        ("html", "not an image"),
        ("file", "cannot read: "),
        ("ftp", "cannot read: "),
        ("short", "cannot read: cut off: [0-9]+ of 99999 bytes came"),
    ):
        with pytest.raises(images.ImageError, match=f"{site}/{path}: {cause}"):
            images.as_image(f"{site}/{path}")
    with pytest.raises(images.ImageError, match="more than the limit of 9 bytes"):
        web.read(f"{site}/a.png", max_bytes=9)
    with pytest.raises(images.ImageError, match="cannot read: .*(longer than|timed out)"):
        web.read(f"{site}/slow", max_bytes=9, seconds=0.05)
    with pytest.raises(images.ImageError, match="URLs are not read here"):
        images.as_image(f"{site}/a.png", reach="files")
    for name in (f"{site}/a.png", __file__):
        with pytest.raises(images.ImageError, match="not taken here; give the content"):
            images.as_image(name, reach="nothing")
    monkeypatch.setenv("VLM_JAX_FETCH", "0")
    with pytest.raises(images.ImageError, match="switched off"):
        images.as_image(f"{site}/a.png")


def test_heic_names_its_package_and_works_with_it(monkeypatch):
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(images.ImageError, match="a.heic: HEIC .* pip install pillow-heif"):
        images.decode(content, name="a.heic")

    class Heif(Image.Image):
        format = "HEIF"

        def __init__(self, stream, name=None):
            super().__init__()
            self.im, self._mode = Image.fromarray(RGB).im, "RGB"
            self._size = self.im.size

    def register_heif_opener():
        Image.register_open("HEIF", Heif, lambda prefix: prefix[4:8] == b"ftyp")

    package = types.SimpleNamespace(register_heif_opener=register_heif_opener)
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    np.testing.assert_array_equal(images.decode(content), RGB)


def test_one_or_many():
    pil, path = Image.fromarray(RGB), "a.png"
    for one in (RGB, RGB[..., 0], pil, path, b"", torch_of(RGB), jnp.asarray(RGB)):
        assert images.one_or_many(one)[1]
    for many in ([RGB, path], (pil,), np.stack([RGB, RGB]), iter([pil]), np.array(["a", "b"]), []):
        assert not images.one_or_many(many)[1]
    assert len(images.one_or_many(torch_of(np.stack([RGB, RGB])))[0]) == 2
    for neither in (None, 3, {"image": RGB}, np.zeros(4, np.uint8)):
        with pytest.raises(images.ImageError, match="holds no pictures"):
            images.one_or_many(neither)


def test_the_tokenizer_takes_every_kind(tmp_path):
    tokenizer = image_tokenizer.ImageTokenizer.load("tiny", side=16, max_batch=4)
    image_u8 = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    ids = tokenizer.encode(images.to01(image_u8)[None])
    kinds = [image_u8, images.to01(image_u8), image_u8 / 255.0, Image.fromarray(image_u8)]
    np.testing.assert_array_equal(tokenizer.encode(kinds), np.tile(ids, (4, 1)))
    np.testing.assert_array_equal(tokenizer.encode(np.stack([image_u8] * 2)), np.tile(ids, (2, 1)))
    np.testing.assert_array_equal(tokenizer.encode(image_u8), ids[0])
    assert tokenizer.encode([]).shape == (0, 16)
    for wrong in (image_u8.astype(np.float32), images.to01(image_u8) * 2 - 1):
        with pytest.raises(images.ImageError, match="picture 0: values from"):
            tokenizer.encode([wrong])
    with pytest.raises(images.ImageError, match=r"\[C, H, W\]"):
        tokenizer.encode(images.to01(image_u8).transpose(2, 0, 1)[None])


def test_records_hold_bytes_or_arrays_of_bytes():
    content = file_of(Image.fromarray(RGB))
    for record in ({"image_u8": RGB}, {"png": content}, {"image": content, "id": "7"}):
        np.testing.assert_array_equal(images.of_record(record), RGB)
    with pytest.raises(records.BadRecordError, match=r"image_u8 is uint8\[6, 5\], not"):
        images.of_record({"image_u8": RGB[..., 0]})
    with pytest.raises(images.ImageError, match="URLs are not read here"):
        images.of_record({"image": "http://127.0.0.1:9/a.png"})
