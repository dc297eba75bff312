"""Pictures to ids and back, from the command line."""

import json

import numpy as np
import pytest

from vlm_jax import predict
from vlm_jax.data import images
from vlm_jax.encoders import image_tokenizer


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name in ("a/1.png", "b/1.png", "b/1.bmp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image_u8 = np.random.default_rng(len(name)).integers(0, 256, (20, 24, 3), np.uint8)
        (folder / name).write_bytes(images.encode(image_u8, name[-3:]))
    (folder / "b" / "bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def run(monkeypatch):
    tokenizer = image_tokenizer.ImageTokenizer.load("tiny", side=16, max_batch=4)
    monkeypatch.setattr("vlm_jax.loading.load", lambda *_, **__: tokenizer)

    def call(*arguments):
        predict.main(["vqgan", "--checkpoint=tiny", "--batch_size=4", *map(str, arguments)])

    call.tokenizer = tokenizer
    return call


def test_encode_decode_reconstruct(photos, run, tmp_path, capsys):
    ids, pictures, back = tmp_path / "ids.jsonl", tmp_path / "pictures", tmp_path / "back"
    run("--image", photos, f"--out={ids}")
    rows = [json.loads(line) for line in ids.read_text().splitlines()]
    names = [str(photos / name) for name in ("a/1.png", "b/1.bmp", "b/1.png")]
    assert [row["id"] for row in rows] == names
    expected = run.tokenizer.encode(names)
    np.testing.assert_array_equal([row["ids"] for row in rows], expected)
    assert "3 inputs done, 0 were there, 1 unreadable" in capsys.readouterr().err
    run("--image", photos, f"--out={back}")
    run("--ids", ids, f"--out={pictures}")
    decoded = run.tokenizer.decode_u8(expected)
    for folder in (back, pictures):
        kept = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
        assert [row["id"] for row in kept] == names
        for row, image_u8 in zip(kept, decoded):
            np.testing.assert_array_equal(images.decode(folder / row["file"]), image_u8)
        grid_u8 = images.decode(folder / "grid.png")
        shown = {tuple(pixel) for pixel in grid_u8.reshape(-1, 3).tolist()}
        for image_u8 in decoded:  # scaled up by whole pixels, or smoothly: most colours stay
            colours = {tuple(pixel) for pixel in image_u8.reshape(-1, 3).tolist()}
            assert len(colours & shown) > 0.3 * len(colours)
    assert [row["file"] for row in kept] == [
        f"pictures/{name}.png" for name in ("a/1", "b/1.bmp", "b/1.png")
    ]
    before = ids.read_bytes()
    run("--image", photos, f"--out={ids}")
    assert ids.read_bytes() == before and "3 were there" in capsys.readouterr().err


def test_bad_ids_and_options(run, tmp_path, capsys):
    def fails(*arguments):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        return stopped.value.code, capsys.readouterr().err

    file = tmp_path / "ids.jsonl"
    file.write_text('{"id": "a", "ids": [1, 2]}\n')
    code, said = fails("--ids", file, f"--out={tmp_path / 'made'}")
    assert code == 1 and "2 ids; 16 of 0..1023 are a picture" in said
    for line in (
        '{"id": "a", "ids": [4294967297]}',
        '{"id": "a"}',
        '{"id": "a", "ids": ["x"]}',
        '{"id": "a", "ids": [1e999]}',
        "[",
    ):
        file.write_text(line)
        code, said = fails("--ids", file, f"--out={tmp_path / 'other'}")
        assert code == 2 and f"{file}:1: " in said
    assert fails("--ids", file, "--out=x.jsonl")[0] == 2
    assert fails("--image", file, "--out=x", "--batch_size=0")[0] == 2


def test_help_names_every_system_and_default(capsys):
    for arguments, words in (
        (["--help"], ["Systems:\n", "lvm", "nxtp", "vqgan"]),
        (["vqgan", "--help"], ["(default: 16)"]),
        (["nxtp", "--help"], ["--ranking", "--threshold", "--prompt", "(default: 20)"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            predict.main(arguments)
        assert stopped.value.code == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words)
