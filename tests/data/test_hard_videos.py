"""Videos whose time stamps, names, orientation or content are not simple."""

import io
import os
import resource
import struct

import numpy as np
import pytest

from tests import fuzz
from vlm_jax.data import images, mp4_boxes, video

av = pytest.importorskip("av")

# suffix, codec, options; a GOP of 12 in 40 frames.
KINDS = {
    "mp4": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "mkv": ("libx264", {"g": "12", "bf": "3"}),
    "avi": ("libx264", {"g": "12", "bf": "2", "x264-params": "open-gop=1"}),
    "AVI": ("mpeg4", {"g": "12", "bf": "2"}),
    "ts": ("libx264", {"g": "12", "bf": "2"}),
    "mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "webm": ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "wmv": ("wmv2", {"g": "12"}),
    "flv": ("flv1", {"g": "12"}),
    "h264": ("libx264", {"g": "12", "bf": "2"}),
    "gif": ("gif", {}),
}


def write(path, codec="mpeg4", options=(), count=40, size=(48, 32), metadata=()):
    """Frames of growing brightness with a white corner above left."""
    path = os.fspath(path)
    with av.open(path, "w", format="mpegts" if path.endswith(".ts") else None) as container:
        container.metadata.update(metadata)
        try:
            track = container.add_stream(codec, rate=25, options=dict(options))
        except av.error.FFmpegError:
            pytest.skip(f"no encoder {codec}")
        track.width, track.height = size
        track.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for number in range(count):
            frame_u8 = np.full((size[1], size[0], 3), 20 + 5 * number, np.uint8)
            frame_u8[: size[1] // 2, : size[0] // 2] = 255
            frame = av.VideoFrame.from_ndarray(frame_u8, format="rgb24")
            frame = frame.reformat(format=track.pix_fmt)
            frame.pts = number
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return path


@pytest.mark.parametrize("suffix", KINDS)
def test_frames_by_number_are_those_of_reading_all(tmp_path, suffix):
    path = write(tmp_path / f"clip.{suffix}", *KINDS[suffix])
    true = video.read_frames(path)
    assert video.count_frames(path) == len(true) == 40
    for wanted in ([0, 3, 5], [1], [11, 12, 13], [24], [23, 30, 36], [38, 39]):
        np.testing.assert_array_equal(video.read_at(path, wanted), true[wanted])
    with pytest.raises(images.ImageError, match="has 40 frames, none at 40"):
        video.read_at(path, [3, 40])


def test_a_wrong_stamp_is_noticed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    true = video.read_frames(path)
    stamps = video._stamps

    def wrong(container):
        found = stamps(container)
        return [*found[:20], found[20] + 1, *found[21:]]

    monkeypatch.setattr(video, "_stamps", wrong)
    np.testing.assert_array_equal(video.read_at(path, [19, 20, 21]), true[[19, 20, 21]])


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((1, 0, 0, 1), lambda f: f),
        ((0, 1, -1, 0), lambda f: np.rot90(f, -1, (1, 2))),  # EXIF 6: a phone held upright
        ((0, -1, 1, 0), lambda f: np.rot90(f, 1, (1, 2))),  # EXIF 8
        ((-1, 0, 0, -1), lambda f: f[:, ::-1, ::-1]),  # EXIF 3
        ((-1, 0, 0, 1), lambda f: f[:, :, ::-1]),  # EXIF 2
        ((0, 1, 1, 0), lambda f: f.swapaxes(1, 2)),  # EXIF 5
    ],
)
def test_the_display_matrix_is_applied(tmp_path, matrix, turned):
    path = write(tmp_path / "phone.mp4", count=4)
    plain = video.read_frames(path)
    content = open(path, "rb").read()
    at = content.index(b"tkhd") + 44
    xx, xy, yx, yy = (value << 16 for value in matrix)
    fields = struct.pack(">9i", xx, xy, 0, yx, yy, 0, 0, 0, 1 << 30)
    with open(path, "wb") as stream:
        stream.write(content[:at] + fields + content[at + 36 :])
    np.testing.assert_array_equal(video.read_frames(path), turned(plain))
    np.testing.assert_array_equal(video.read_at(path, [1, 3]), turned(plain)[[1, 3]])
    small = video.read_frames(path, size=(8, 6), count=1)
    np.testing.assert_array_equal(small[0], video.resize(turned(plain)[0], (8, 6)))


def test_names_and_metadata_of_any_kind(tmp_path, monkeypatch):
    true = video.read_frames(write(tmp_path / "x.mp4", count=3))
    content = (tmp_path / "x.mp4").read_bytes()
    monkeypatch.chdir(tmp_path)
    for name in (b"12:30.mp4", b"http:x.mp4", b"\xff\xe9.mp4", b"-", b"%d.mp4", b"no suffix"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as stream:
            stream.write(content)
        np.testing.assert_array_equal(video.read_at(os.fsdecode(name), [0, 2]), true[[0, 2]])
    tagged = write(tmp_path / "tagged.mkv", count=3, metadata={"title": "TITLE"})
    content = open(tagged, "rb").read().replace(b"TITLE", b"\xff\xfe\xff\xe9\xff")
    assert len(video.read_frames(content)) == 3
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(images.ImageError, match="pipe.mp4: is a pipe, socket or device"):
        video.count_frames("pipe.mp4")
    with pytest.raises(images.ImageError, match="is a folder"):
        video.count_frames(".")


def test_descriptions_of_streams_are_no_videos(tmp_path):
    path = write(tmp_path / "x.mp4", count=3)
    texts = [
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {path}\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
        f"[reference]\nRef1={path}\n",
    ]
    for number, text in enumerate(texts):
        file = tmp_path / f"{number}.mp4"
        file.write_text(text)
        for source in (text.encode(), str(file)):
            with pytest.raises(
                images.ImageError, match="cannot decode: (none of the containers mov|Invalid data)"
            ):
                video.read_frames(source)
        with pytest.raises(images.ImageError, match="cannot decode"):
            video.count_frames(file)


def test_bounds_hold_before_decoding(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", count=10)
    monkeypatch.setattr(video, "MAX_OUTPUT", 6 * 48 * 32 * 3)
    assert len(video.read_frames(path, count=6)) == len(video.read_at(path, range(6))) == 6
    assert len(video.read_frames(path, size=8)) == 10
    with monkeypatch.context() as patch:
        patch.setattr(video, "_upright", None)  # nothing is decoded
        with pytest.raises(images.ImageError, match=r"10 frames of 48x32 are over .* smaller ones"):
            video.read_frames(path)
        with pytest.raises(images.ImageError, match="7 frames of 48x32 are over the limit"):
            video.read_at(path, range(7))
    raw = write(tmp_path / "a.h264", "libx264", count=10)  # tells no number of frames
    with pytest.raises(images.ImageError, match="7 frames of 48x32 are over the limit"):
        video.read_frames(raw)
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(images.ImageError, match="frames of 48x32 are over the limit of 1000"):
        video.count_frames(path)


def test_frames_that_change_their_size_need_one(tmp_path):
    parts = [
        open(write(tmp_path / f"{n}.h264", "libx264", count=3, size=size), "rb").read()
        for n, size in enumerate([(48, 32), (64, 64)])
    ]
    with pytest.raises(images.ImageError, match="frame 3 is 64x64, those before 48x32; give size="):
        video.read_frames(b"".join(parts))
    assert video.read_frames(b"".join(parts), size=16).shape == (6, 16, 16, 3)


def test_a_fragment_that_promises_samples_is_refused(tmp_path):
    path = tmp_path / "a.mp4"
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    with av.open(str(path), "w", options=flags) as container:
        track = container.add_stream("mpeg4", rate=25)
        track.width, track.height, track.pix_fmt = 48, 32, "yuv420p"
        for _ in range(4):
            grey = np.full((32, 48, 3), 99, np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(track.encode())
    assert video.count_frames(path) == 4
    content = path.read_bytes()
    at = content.index(b"trun")
    hostile = content[: at + 4] + struct.pack(">II", 1, 2**27) + content[at + 12 :]
    with pytest.raises(images.ImageError, match="134217728 samples in .* bytes cannot be"):
        video.read_frames(hostile)


def test_mutated_files_are_videos_or_named_errors(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "mutated"
    for suffix in ("mp4", "mkv", "AVI", "ts", "wmv", "gif"):
        content = open(write(tmp_path / f"a.{suffix}", *KINDS[suffix], count=6), "rb").read()
        for made in fuzz.mutations(content, 50):
            path.write_bytes(made)
            for read in (
                lambda: video.read_frames(made, name="mutated"),  # noqa: B023
                lambda: video.read_at(path, [0, 2]),
                lambda: np.empty((video.count_frames(path), 1, 1, 3), np.uint8),
            ):
                try:
                    assert read().dtype == np.uint8
                except images.ImageError as error:
                    assert "mutated: " in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_counts_are_read_from_boxes_only():
    for content in (b"", b"\0" * 40, b"\0\0\0\x08ftyp" + b"\xff" * 40, b"RIFF" + b"\xff" * 90):
        stream = io.BytesIO(content)
        mp4_boxes.check_counts(stream)
        assert stream.tell() == 0
