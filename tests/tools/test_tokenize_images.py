"""The tokenizing tool on files of this test; the real photos and kills are slow tests."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import images, sources, video
from vlm_jax.datasets import visual_sentences
from vlm_jax.encoders import image_tokenizer
from vlm_jax.systems.lvm import format as lvm_format
from vlm_jax.tools import token_preview, tokenize_images

SIDE, PER_IMAGE = 16, 16  # pixels; the tiny tokenizer reduces by 4


_load_once = functools.cache(image_tokenizer.ImageTokenizer.load)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Commands of one process share what they have compiled."""
    monkeypatch.setattr(image_tokenizer.ImageTokenizer, "load", _load_once)


@pytest.fixture
def tokenizer():
    return _load_once("tiny", side=SIDE, codebook_size=0, tokens_per_image=0, max_batch=8)


@pytest.fixture
def photos(tmp_path):
    """Ten photos of random colours, 20 x 24 pixels."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        image_u8 = rng.integers(0, 256, (20, 24, 3), np.uint8)
        (folder / f"{number}.png").write_bytes(images.encode(image_u8))
    return folder


def run(*flags):
    common = ["--tokenizer=tiny", f"--side={SIDE}", "--batch=8", "--threads=2"]
    return tokenize_images.main([*common, *map(str, flags)])


def shards(folder, suffix=".array_record"):
    """Name -> content of the token files."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"*{suffix}"))}


def sentences(folder):
    return [
        s for path in sorted(folder.glob("*.array_record")) for s in visual_sentences.read(path)
    ]


def test_ids_are_those_of_the_tokenizer(tmp_path, photos, tokenizer, capsys):
    out = tmp_path / "out"
    assert run("--layout=single", f"--input={photos}", f"--out={out}", "--shards=3") == 0
    assert list(shards(out)) == [f"single-0000{n}-of-00003.array_record" for n in range(3)]
    found = sentences(out)
    expected = tokenizer.encode_u8([images.decode(photos / f"{n}.png") for n in range(10)])
    np.testing.assert_array_equal([s.tokens for s in found], expected)
    assert [s.id for s in found] == [f"single:{n}" for n in range(10)]
    assert {(s.num_images, s.source) for s in found} == {(1, "single")}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {
        "shards": 3,
        "sentences": 10,
        "images": 10,
        "files": 10,
        "bad_files": 0,
        "failures": 0,
    }
    assert (out / "failures.txt").read_text() == ""
    assert "10 sentences, 10 different images of 10 files" in capsys.readouterr().err


def test_colorization_tokenizes_unrounded_grey(tmp_path, photos, tokenizer):
    out = tmp_path / "out"
    flags = ("--layout=colorization", f"--input={photos}", "--images=4", "--epochs=2")
    assert run(*flags, f"--out={out}") == 0
    found = sentences(out)
    assert len(found) == 10 and found[0].num_images == 4
    colour = images.to01(
        np.stack([images.resize(images.decode(photos / f"{n}.png"), SIDE) for n in range(10)])
    )
    grey_ids, ids = tokenizer.encode(images.grey(colour)), tokenizer.encode(colour)
    for epoch in (found[:5], found[5:]):
        rows = np.concatenate([s.tokens.reshape(2, 2, PER_IMAGE) for s in epoch])
        chosen = [int((ids == row[1]).all(1).argmax()) for row in rows]
        assert sorted(chosen) == list(range(10))  # every photo once an epoch
        np.testing.assert_array_equal(rows[:, 0], grey_ids[chosen])
        np.testing.assert_array_equal(rows[:, 1], ids[chosen])
    # Two epochs of twenty images are ten photos and ten greys.
    assert json.loads((out / "manifest.json").read_text())["counts"]["images"] == 20


def test_videos_and_their_strides(tmp_path, tokenizer):
    av = pytest.importorskip("av")
    clips = tmp_path / "clips"
    clips.mkdir()
    for name, count in (("a", 30), ("b", 12), ("short", 3)):
        with av.open(str(clips / f"{name}.mp4"), "w") as container:
            track = container.add_stream("mpeg4", rate=10)
            track.width, track.height, track.pix_fmt, track.bit_rate = 48, 32, "yuv420p", 4_000_000
            for number in range(count):
                frame = np.zeros((32, 48, 3), np.uint8)
                frame[:, : number + 8] = 255  # a wall moves in
                container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(track.encode())
    out = tmp_path / "out"
    flags = ["--layout=video", f"--input={clips}", "--images=4", "--stride=2,9"]
    assert run(*flags, f"--out={out}", "--max_bad_fraction=0.5") == 0
    found = {s.id: s.tokens.reshape(4, PER_IMAGE) for s in sentences(out)}
    assert list(found) == ["video:0", "video:1", "video:3", "video:4"]
    for number, name, stride in ((0, "a", 2), (1, "b", 2), (3, "a", 9), (4, "b", 3)):
        frames = video.read_frames(clips / f"{name}.mp4", size=SIDE)
        ids = tokenizer.encode(images.to01(frames))
        clips_of_ids = [
            ids[at : at + 3 * stride + 1 : stride] for at in range(len(ids) - 3 * stride)
        ]
        assert any((found[f"video:{number}"] == clip).all() for clip in clips_of_ids)
    lines = (out / "failures.txt").read_text().splitlines()
    assert lines == [
        f"video:{n}\t{clips / 'short.mp4'}: 3 frames cannot give 4 images" for n in (2, 5)
    ]


def test_annotations_are_drawn(tmp_path, photos, tokenizer):
    path, out = tmp_path / "boxes.json", tmp_path / "out"
    objects = [{"label": 1, "box": [4, 4, 20, 16]}]
    path.write_text(json.dumps([{"image": f"{n}.png", "objects": objects} for n in range(10)]))
    call = f"{path}:boxes:black"
    flags = ["--layout=pairs", f"--input={photos}", f"--annotations={call}", "--images=20"]
    assert run(*flags, f"--out={out}") == 0
    (sentence,) = sentences(out)
    drawn = np.zeros((20, 24, 3), np.uint8)
    drawn[[4, 16], 4:21, 0] = drawn[4:17, [4, 20], 0] = 128
    expected = tokenizer.encode_u8([drawn])[0]
    rows = sentence.tokens.reshape(10, 2, PER_IMAGE)
    assert (rows[:, 1] == expected).all() and not (rows[:, 0] == expected).all(1).any()


def test_processes_share_the_shards(tmp_path, photos):
    flags = ["--layout=inpainting", f"--input={photos}", "--images=4", "--epochs=3", "--shards=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*flags, f"--out={one}") == 0
    for process in (1, 0):
        assert run(*flags, f"--out={two}", "--num_processes=2", f"--process_id={process}") == 0
        assert len(shards(two)) == (2 if process else 4)
    assert shards(one) == shards(two)
    assert (one / "manifest.json").read_text() == (two / "manifest.json").read_text()
    third = tmp_path / "third"
    assert run(*flags, f"--out={third}", "--shard=2") == 0
    assert list(shards(third)) == ["inpainting-00002-of-00004.array_record"]


def test_processes_from_the_environment(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert tokenize_images.processes() == (1, 0)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "5")
    assert tokenize_images.processes() == (8, 5)
    assert tokenize_images.processes(2, 1) == (2, 1)
    for given in ((2, -1), (0, 1), (2, 2)):
        with pytest.raises(ValueError, match="give both, the id from 0"):
            tokenize_images.processes(*given)


def test_an_unfinished_shard_is_made_again(tmp_path, photos, capsys):
    out = tmp_path / "out"
    flags = ["--layout=single", f"--input={photos}", f"--out={out}", "--shards=3"]
    assert run(*flags) == 0
    before = shards(out)
    # As a kill leaves it: one shard without its note, one half-written.
    (out / "shards" / "00001.json").unlink()
    (out / "single-00002-of-00003.array_record").unlink()
    partial = out / ".single-00002-of-00003.array_record.123"
    partial.write_bytes(b"half")
    old = (out / "single-00000-of-00003.array_record").stat().st_mtime_ns
    assert run(*flags) == 0
    assert shards(out) == before and not partial.exists()
    assert (out / "single-00000-of-00003.array_record").stat().st_mtime_ns == old
    assert "3 of 3 shards, 1 of them were there" in capsys.readouterr().err


def test_other_arguments_are_refused(tmp_path, photos, capsys):
    out = tmp_path / "out"
    flags = ["--layout=single", f"--input={photos}", f"--out={out}"]
    assert run(*flags) == 0
    assert run(*flags, "--seed=1", "--epochs=2", "--shards=1") == 1
    message = capsys.readouterr().err
    assert "made of something else" in message
    assert "seed: 0 there, 1 now" in message and "epochs: 1 there, 2 now" in message
    (photos / "new.png").write_bytes((photos / "1.png").read_bytes())
    assert run(*flags) == 1
    assert "files: 10 there, 11 now" in capsys.readouterr().err


def test_corrupt_files_are_counted_and_named(tmp_path, photos, capsys):
    whole = (photos / "3.png").read_bytes()
    (photos / "3.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    flags = ["--layout=single", f"--input={photos}", f"--out={out}", "--shards=2"]
    assert run(*flags) == 1
    message = capsys.readouterr().err
    assert "1 of 10 files cannot be used, more than --max_bad_fraction=0.01" in message
    assert "left out single:3: " in message and "3.png" in message
    # Stopped again when resumed: what was counted before is not forgotten.
    assert run(*flags) == 1
    assert run(*flags, "--max_bad_fraction=0.2") == 0
    assert [s.id for s in sentences(out)] == [f"single:{n}" for n in range(10) if n != 3]
    (line,) = (out / "failures.txt").read_text().splitlines()
    assert line.startswith("single:3\t") and "3.png" in line
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (counts["sentences"], counts["bad_files"], counts["failures"]) == (9, 1, 1)


def test_upstream_jsonl(tmp_path, photos):
    records, lines = tmp_path / "records", tmp_path / "lines"
    flags = ["--layout=colorization", f"--input={photos}", "--images=4"]
    assert run(*flags, f"--out={records}") == 0
    assert run(*flags, f"--out={lines}", "--format=jsonl") == 0
    source = sources.make_source(type="jsonl", path=str(lines / "*.jsonl"))
    read = lvm_format.Formatter(fields="{tokens}", vocab_size=1024)
    found = [read.encode(source[index])[0] for index in range(len(source))]
    np.testing.assert_array_equal(found, [s.tokens for s in sentences(records)])


def test_preview_decodes_token_files(tmp_path, photos, tokenizer):
    out, picture = tmp_path / "out", tmp_path / "look" / "preview.png"
    flags = ["--layout=colorization", f"--input={photos}", "--images=4", f"--out={out}"]
    assert run(*flags, "--format=jsonl", f"--preview={picture}", "--preview_rows=3") == 0
    # Three rows of four images, 4 pixels between.
    assert Image.open(picture).size == (4 + 4 * (SIDE + 4), 4 + 3 * (SIDE + 4))
    picture.unlink()
    assert run(f"--preview={picture}", f"--out={out}") == 0
    assert Image.open(picture).size == (4 + 4 * (SIDE + 4), 4 + 5 * (SIDE + 4))
    # Of the upstream form, with a sentence of 20 images: two lines.
    ids = np.arange(20 * PER_IMAGE) % 1024
    path = tmp_path / "theirs.jsonl"
    path.write_text(json.dumps({"tokens": lvm_format.to_base64(ids)}) + "\n")
    assert run(f"--preview={picture}", f"--tokens={path}") == 0
    drawn = np.array(Image.open(picture))
    assert drawn.shape == (4 + 2 * (SIDE + 4), 4 + 16 * (SIDE + 4), 3)
    first = tokenizer.decode_u8(ids[None, :PER_IMAGE])[0]
    np.testing.assert_array_equal(drawn[4 : 4 + SIDE, 4 : 4 + SIDE], first)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5000] * 16, "was the file made with another codebook"),
        ([5] * 17, "not whole images of 16"),
    ],
)
def test_previews_that_cannot_be(tmp_path, tokenizer, ids, message):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"tokens": lvm_format.to_base64(np.array(ids))}) + "\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl:1: .*{message}"):
        token_preview.write(tmp_path / "x.png", [path], tokenizer)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to do: give --layout, or --preview"),
        (["--layout=single"], "--input is missing"),
        (["--layout=single", "--input=IN"], "--out is missing"),
        (["--layout=single", "--input=gone", "--out=OUT"], "gone: no such folder"),
        (["--layout=video", "--input=IN", "--out=OUT"], "holds no file that ends with .mp4"),
        (
            ["--layout=colorization", "--input=IN", "--images=40", "--out=OUT"],
            "are too few for one",
        ),
        (["--layout=single", "--input=IN", "--out=OUT", "--shards=11"], "would be empty"),
        (["--layout=single", "--input=IN", "--out=OUT", "--shards=2", "--shard=2"], "not below"),
        (["--layout=single", "--input=IN", "--out=IN/0.png/x"], "Not a directory"),
        (["--layout=single", "--input=IN", "--out=OUT", "--name=../x"], "not the name of files"),
        (["--layout=single", "--input=IN", "--out=OUT", "--name=."], "not the name of files"),
        (["--layout=single", "--input=IN", "--out=OUT", "--codebook_size=8192"], "has 1024 codes"),
        (
            ["--layout=single", "--input=IN", "--out=OUT", "--tokens_per_image=256"],
            "has 16 ids per",
        ),
        (["--layout=single", "--input=IN", "--out=OUT", "--tokenizer=gone"], "gone"),
        (["--preview=x.png", "--out=OUT"], "no token files to preview"),
    ],
)
def test_one_clear_line_for_bad_input(tmp_path, photos, capsys, flags, message):
    named = {"IN": str(photos), "OUT": str(tmp_path / "out")}
    filled = [flag.replace("IN", named["IN"]).replace("OUT", named["OUT"]) for flag in flags]
    assert run(*filled) == 1
    assert message in capsys.readouterr().err
    assert not shards(tmp_path / "out")


ENVIRONMENT = {**os.environ, "XLA_FLAGS": ""}  # one device: what the commands do here is small
COMMAND = [sys.executable, "-m", "vlm_jax.tools.tokenize_images", "--tokenizer=tiny"]


def start(*flags):
    return subprocess.Popen(
        [*COMMAND, *map(str, flags)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_real_photos_killed_and_resumed(tmp_path, demo_data):
    from vlm_jax.datasets import demo_photos

    photos = tmp_path / "photos"
    for record in demo_photos.load_tiny("heldout"):
        folder = photos / str(record["label"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{record['id']}.png").write_bytes(images.encode(record["image_u8"]))
    flags = ["--layout=single", f"--input={photos}", "--epochs=20", "--shards=20", "--side=32"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = start(*flags, f"--out={whole}", "--threads=1")
    assert done.wait() == 0, done.stderr.read()

    victim = start(*flags, f"--out={killed}", "--threads=3")
    while victim.poll() is None and len(shards(killed)) < 2:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, "finished before the kill"
    assert 2 <= len(shards(killed)) < 20
    again = start(*flags, f"--out={killed}")
    assert again.wait() == 0, again.stderr.read()
    assert "0 of them were there" not in again.stderr.read()
    assert shards(killed) == shards(whole)

    tokenizer = image_tokenizer.ImageTokenizer.load("tiny", side=32)
    names = sorted(photos.glob("*/*.png"), key=lambda p: (int(p.parent.name), p.name))
    expected = tokenizer.encode_u8([images.decode(path) for path in names])
    found = {tuple(sentence.tokens) for sentence in sentences(whole)}
    assert found == {tuple(row) for row in expected}


RECIPE = """
import ml_collections

def get_config(arg=""):
    return ml_collections.ConfigDict(dict(
        system="lvm",
        model=dict(vocab_size=1124, width=32, depth=1, mlp_width=64, num_heads=2, max_tokens=64,
                   dtype="float32"),
        task=dict(codebook_size=1024, tokens_per_image=16),
        formatter=dict(max_tokens=64, bos_id=1024, eos_id=1025, vocab_size=1124),
        data=dict(mixture=dict(ours=dict(type="jsonl", path="", weight=1.0)), packing="stream"),
        optim=dict(lr=1e-3),
        train=dict(steps=2, batch_size=8, log_every=1, save_every=2),
    ))
"""


@pytest.mark.slow
def test_jsonl_trains_a_recipe(tmp_path, photos):
    tokens, recipe = tmp_path / "tokens", tmp_path / "recipe.py"
    flags = ["--layout=colorization", f"--input={photos}", "--images=4", "--epochs=5"]
    assert run(*flags, f"--out={tokens}", "--format=jsonl") == 0
    recipe.write_text(RECIPE)
    command = [
        sys.executable,
        "-m",
        "vlm_jax.main",
        f"--config={recipe}",
        f"--workdir={tmp_path}/w",
    ]
    path = f"--config.data.mixture.ours.path={tokens}/*.jsonl"
    done = subprocess.run([*command, path], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2/2" in done.stderr
