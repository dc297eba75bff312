import fractions
import io

import numpy as np
import pytest

from vlm_jax.data import images, video

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def clip():
    """12 frames of 32x48 whose brightness is 20 times their number."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("mpeg4", rate=fractions.Fraction(10))
        track.width, track.height, track.pix_fmt, track.bit_rate = 48, 32, "yuv420p", 4_000_000
        for number in range(12):
            grey = np.full((32, 48, 3), 20 * number, np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(track.encode())
    return stream.getvalue()


def numbers(frames):
    return np.rint(frames.mean((1, 2, 3)) / 20).astype(int).tolist()


def test_reads_frames_in_order(clip, tmp_path):
    frames = video.read_frames(clip)
    assert frames.shape == (12, 32, 48, 3) and frames.dtype == np.uint8
    assert numbers(frames) == list(range(12))
    assert numbers(video.read_frames(clip, start=1, stride=4)) == [1, 5, 9]
    assert numbers(video.read_frames(clip, stride=2, count=3)) == [0, 2, 4]
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    assert video.read_frames(path, size=8, crop=True, antialias=True).shape == (12, 8, 8, 3)


def test_bad_videos(clip, tmp_path):
    with pytest.raises(images.ImageError, match="noise.mp4: cannot decode"):
        video.read_frames(b"no video here" * 9, name="noise.mp4")
    with pytest.raises(images.ImageError, match="gone.mp4"):
        video.read_frames(tmp_path / "gone.mp4")
    with pytest.raises(images.ImageError, match="no frame at or after 12"):
        video.read_frames(clip, start=12)
    with pytest.raises(images.ImageError):
        video.read_frames(clip[: len(clip) // 2])


def test_resize_is_opencv_bit_for_bit():
    # Expected: cv2.resize of OpenCV 4, default interpolation, reducing and enlarging.
    image = (np.arange(5 * 7 * 3) * 37 % 256).astype(np.uint8).reshape(5, 7, 3)
    assert video.resize(image, (3, 4))[..., 0].tolist() == [
        [44, 207, 177, 115],
        [60, 222, 192, 130],
        [74, 87, 207, 145],
    ]
    enlarged = video.resize(image, (8, 9))[..., 1]
    assert enlarged[0].tolist() == [37, 111, 83, 27, 114, 200, 144, 117, 191]
    assert enlarged[7].tolist() == [73, 147, 119, 63, 150, 37, 67, 153, 227]


def test_exact_halving_averages_blocks():
    image = np.array([[[1], [2], [8], [8]], [[3], [4], [8], [9]]], np.uint8)
    assert video.resize(image, (1, 2))[..., 0].tolist() == [[3, 8]]  # (10 + 2) >> 2, (33 + 2) >> 2


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_frames_are_counted_and_read_by_number(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        track = container.add_stream("mpeg4", rate=fractions.Fraction(10))
        track.width, track.height, track.pix_fmt, track.bit_rate = 48, 32, "yuv420p", 4_000_000
        track.gop_size = 5  # key frames 0, 5, 10
        for number in range(12):
            grey = np.full((32, 48, 3), 20 * number, np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(track.encode())
    assert video.count_frames(path) == 12
    assert numbers(video.read_at(path, [7, 8, 11])) == [7, 8, 11]
    some = video.read_at(path, [0, 4, 9], size=16)
    np.testing.assert_array_equal(some, video.read_frames(path, size=16)[[0, 4, 9]])
    with pytest.raises(images.ImageError, match="has 12 frames, none at 12"):
        video.read_at(path, [3, 12])


def test_unreadable_videos_are_named(tmp_path):
    path = tmp_path / "noise.mp4"
    path.write_bytes(b"no video here" * 9)
    for function in (video.count_frames, lambda p: video.read_at(p, [0])):
        with pytest.raises(images.ImageError, match="noise.mp4: cannot decode"):
            function(path)
