"""Token files of somebody's own folder; those of the wheels are tested with the recipes."""

import numpy as np
import pytest
from PIL import Image

from tests.datasets import own_data
from vlm_jax.data import records
from vlm_jax.datasets import visual_sentences
from vlm_jax.program import config as config_lib
from vlm_jax.systems.lvm import preparation

FEW = dict(sentences=4, heldout_sentences=2, image_side=32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def made(workdir):
    return sorted(path.name.partition(".")[0] for path in workdir.glob("own/*.array_record"))


def test_kinds_are_what_the_folder_gives(tmp_path, capsys):
    folder = own_data.class_folders(tmp_path / "photos", count=6)
    own_data.videos(folder / "clips", count=3)
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    preparation.prepare(tmp_path / "run", path=str(folder), images=4, **FEW)
    every = {f"train_{kind}" for kind in ("video", "pan", "colour", "inpaint", "group")}
    assert every <= set(made(tmp_path / "run"))
    sentences = list(visual_sentences.read(tmp_path / "run/own/train_video.array_record"))
    assert [(len(x.tokens), x.num_images) for x in sentences] == [(256, 4)] * 4
    err = capsys.readouterr().err
    assert "broken.png" in err
    assert "of kind pan (train)" in err and "of kind pan (heldout)" in err  # while it works
    # Nothing changed: nothing is made again. A file more: everything is.
    before = (tmp_path / "run/own/train_pan.array_record").stat().st_mtime_ns
    preparation.prepare(tmp_path / "run", path=str(folder), images=4, **FEW)
    assert (tmp_path / "run/own/train_pan.array_record").stat().st_mtime_ns == before
    own_data.photo(folder / "cat" / "more.png", 99)
    preparation.prepare(tmp_path / "run", path=str(folder), images=4, **FEW)
    assert (tmp_path / "run/own/train_pan.array_record").stat().st_mtime_ns != before


def test_what_cannot_be_is_said(tmp_path):
    folder = own_data.videos(tmp_path / "clips", count=2, frames=6)
    with pytest.raises(records.DataError, match="video: no video has 8 frames.*prepare.images"):
        preparation.prepare(tmp_path / "run", path=str(folder), **FEW)
    with pytest.raises(records.DataError, match="train split: colour: 0 photos, and"):
        preparation.prepare(tmp_path / "run", path=str(folder), kinds=("colour",), **FEW)
    with pytest.raises(config_lib.ConfigError, match="'mask'.*none of video, pan"):
        preparation.prepare(tmp_path / "run", path=str(folder), kinds=("mask",), **FEW)
    assert not list((tmp_path / "run").rglob("made_of.json"))


def test_held_out_photos_are_not_trained_on(tmp_path):
    """Two photos of one colour each: panning over one never gives the ids of the other."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("a.png", (250, 30, 20)), ("b.png", (10, 20, 240))):
        Image.fromarray(np.full((64, 64, 3), colour, np.uint8)).save(folder / name)
    preparation.prepare(tmp_path / "run", path=str(folder), images=4, **FEW)
    files = [tmp_path / f"run/own/{split}_pan.array_record" for split in ("train", "heldout")]
    train, held = ({x.tokens.tobytes() for x in visual_sentences.read(file)} for file in files)
    assert len(train) == len(held) == 1 and train != held
