"""NXTP's verbs: labels and attention on the reference's checkpoint, from every kind of file."""

import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from vlm_jax.data import images, records
from vlm_jax.systems.nxtp import model as model_lib
from vlm_jax.systems.nxtp import weights as nxtp
from vlm_jax.weights import errors, readers

PARAMS_JSON = dict(dim=64, n_layers=3, n_heads=4, multiple_of=16, norm_eps=1e-5, vocab_size=-1)


@pytest.fixture(scope="module")
def files(golden_nxtp, tmp_path_factory):
    """The checkpoint as a user has it: a released .pth, a CLIP file, LLaMA's folder, photos."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("nxtp")
    tensors = readers.read(golden_nxtp / "checkpoint.safetensors")
    meta = json.loads((golden_nxtp / "meta.json").read_text())
    released = {
        name: torch.tensor(tensors[name.removeprefix("module.")])
        for name in meta["checkpoint_trainable_keys_released_form"]
    }
    torch.save(
        {
            "epoch": 3,
            "global_step": 9,
            "model": released,
            "optimizer": {"state": {}},
            "scheduler": {"last_epoch": 9},
        },
        folder / "released.pth",
    )
    tower = {
        name.replace("vision_encoder.", "visual."): torch.tensor(tensors[name])
        for name in tensors
        if name.startswith("vision_encoder.") and "logit" not in name and ".proj." not in name
    }
    tower["visual.proj"] = torch.zeros(128, 32)
    torch.save(tower, folder / "clip.pt")
    llama = folder / "llama"
    llama.mkdir()
    (llama / "params.json").write_text(json.dumps(PARAMS_JSON))
    (llama / "tokenizer.model").write_bytes((golden_nxtp / "tokenizer.model").read_bytes())
    io = np.load(golden_nxtp / "io.npz")
    photos = [io[f"raw_image_{i}"] for i in range(4)]
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(folder / f"{i}.png")
    return folder, photos, meta, io


@pytest.fixture(scope="module")
def loaded(files):
    folder = files[0]
    return vlm_jax.load(
        "nxtp",
        str(folder / "released.pth"),
        clip=str(folder / "clip.pt"),
        llama=str(folder / "llama"),
    )


def test_pictures_of_every_kind_get_equal_labels(files, loaded):
    folder, photos, _, _ = files
    photo, path = photos[0], folder / "0.png"
    kinds = [
        str(path),
        path.read_bytes(),
        f"file://{path}",
        Image.open(path),
        photo / 255.0,
        jax.numpy.asarray(photo),
        np.dstack([photo, photo[..., 0]]),
    ]
    assert loaded.label(kinds, k=3) == loaded.label([photo] * len(kinds), k=3)
    with pytest.raises(ValueError, match=r"picture 1: shape .* is \[C, H, W\]"):
        loaded.label([photo, photo.transpose(2, 0, 1)])
    with pytest.raises(ValueError, match="values from .* to .*; a picture is uint8, or float"):
        loaded.attention(photo.astype(np.float32))
    with pytest.raises(ValueError, match="a dict holds no pictures"):
        loaded.label({"image": photo})


def test_labels_of_the_reference_program(files, loaded):
    folder, photos, meta, _ = files
    found = loaded.label([folder / f"{i}.png" for i in range(3)] + [photos[3]], k=10)
    for i, labels in enumerate(found):
        theirs = meta["infer_main_labels"][str(i)]
        assert [name for name, _ in labels] == [name for name, _ in theirs]
        np.testing.assert_allclose(
            [score for _, score in labels], [score for _, score in theirs], atol=2e-5
        )
    alone = loaded.label(photos[1], k=10)
    assert [name for name, _ in alone] == [name for name, _ in found[1]]
    np.testing.assert_allclose([x for _, x in alone], [x for _, x in found[1]], atol=1e-6)
    three = {name for name, _ in loaded.label(photos[0], k=3)}
    assert three == {"chair", "street", "blanket"}


def test_few_numbers_of_labels_and_photos_are_compiled(files, loaded):
    photos = files[1]
    loaded._compiled.clear()
    for k in (1, 5, 6, 9):
        labels = loaded.label(photos[0], k=k, max_tokens=3, unfinished=True, ranking="none")
        assert len(labels) <= k
    assert sum(run._cache_size() for run in loaded._compiled.values()) == 2  # of 5 and 10 labels
    several = loaded.label(photos[:3], k=9, max_tokens=3, unfinished=True, ranking="none")
    assert [name for name, _ in several[0]] == [name for name, _ in labels]
    seven_kt, nine_kt = (
        loaded._find(np.stack([loaded._cut(photos[0])]), k, 3, loaded._prompt).ids_bkt[0]
        for k in (7, 9)
    )
    np.testing.assert_array_equal(seven_kt, nine_kt[:7])
    for count in (3, 4):
        loaded.label([photos[0]] * count, k=9, max_tokens=3)
    assert sum(run._cache_size() for run in loaded._compiled.values()) == 3  # 1 and 4 photos


def test_attention_of_the_reference(files, loaded):
    folder, photos, _, io = files
    maps = loaded.attention(photos[0])
    np.testing.assert_allclose(maps, io["prefill_attention"], atol=1e-5)
    sheet = model_lib.attention_sheet(maps[0], 9)
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 4 * 64
    assert (sheet[..., 2] >= sheet[..., 0]).all()  # white to blue


def test_complete_file_without_clip(files, golden_nxtp, loaded):
    folder, photos, *_ = files
    other = vlm_jax.load(
        "nxtp", str(golden_nxtp / "checkpoint.safetensors"), llama=str(folder / "llama")
    )
    assert other.cfg == loaded.cfg
    assert other.label(photos[0], k=3)[0][0] == "chair"


@pytest.mark.parametrize("released", [False, True])
def test_export_and_load_again(files, loaded, tmp_path, released):
    folder = files[0]
    loaded.export(tmp_path / "out.pth", released=released, dtype="float32")
    names = dict(clip=str(folder / "clip.pt")) if released else {}
    again = vlm_jax.load("nxtp", str(tmp_path / "out.pth"), llama=str(folder / "llama"), **names)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_what_is_missing_is_named(files, golden_nxtp, tmp_path):
    folder, *_ = files
    released = str(folder / "released.pth")
    with pytest.raises(errors.WeightsError, match="ViT-L-14.pt"):
        vlm_jax.load("nxtp", released, llama=str(folder / "llama"))
    with pytest.raises(records.DataError, match="no tokenizer is named"):
        vlm_jax.load("nxtp", released, clip=str(folder / "clip.pt"))
    with pytest.raises(errors.WeightsError, match="params.json"):
        vlm_jax.load(
            "nxtp",
            released,
            clip=str(folder / "clip.pt"),
            tokenizer=str(folder / "llama" / "tokenizer.model"),
        )
    (tmp_path / "params.json").write_text(json.dumps(PARAMS_JSON | {"dim": 32}))
    (tmp_path / "tokenizer.model").write_bytes((golden_nxtp / "tokenizer.model").read_bytes())
    with pytest.raises(nxtp.convert.ConversionError, match="tok_embeddings"):
        vlm_jax.load("nxtp", released, clip=str(folder / "clip.pt"), llama=str(tmp_path))


def test_bad_questions(files, loaded, tmp_path):
    with pytest.raises(ValueError, match="k=400 is not in 1 ... 354"):
        loaded.label(files[1][0], k=400)
    with pytest.raises(ValueError, match="ranking='best'"):
        loaded.label(files[1][0], ranking="best")
    with pytest.raises(ValueError, match="no image"):
        loaded.label([])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(images.ImageError, match="text.png"):
        loaded.label(tmp_path / "text.png")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
@pytest.mark.parametrize("size", [(7, 90), (300, 42)])
def test_any_picture_has_labels(loaded, tmp_path, mode, size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    path = tmp_path / ("p.tif" if mode == "CMYK" else "p.png")
    picture.save(path)
    assert len(loaded.label(path, k=3)) >= 1


def test_command_line(files, tmp_path, capsys):
    from vlm_jax import predict

    folder, _, meta, _ = files
    predict.main(
        [
            "nxtp",
            f"--checkpoint={folder / 'released.pth'}",
            f"--clip={folder / 'clip.pt'}",
            f"--llama={folder / 'llama'}",
            "--image",
            str(folder / "0.png"),
            str(folder / "1.png"),
            "--k=10",
            f"--out={tmp_path}",
            "--attention",
        ]
    )
    assert "0.14064  chair" in capsys.readouterr().out
    content = json.loads((tmp_path / "labels.json").read_text())
    assert [entry["labels"][0][0] for entry in content] == ["chair", "chair"]
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == [
        "0_attention_layer_0.png",
        "0_attention_layer_1.png",
        "1_attention_layer_0.png",
        "1_attention_layer_1.png",
        "labels.json",
        "labels.png",
    ]
    assert Image.open(tmp_path / "labels.png").size[0] > 300


def test_a_stream_of_photos(files, loaded):
    _, photos, _, _ = files
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield photos[len(taken) % 4]

    stream = loaded.label_stream(endless(), k=3, batch_size=4, threads=2)
    found = [next(stream) for _ in range(6)]
    assert found[4] == found[0] and found[:4] == loaded.label([*photos[1:], photos[0]], k=3)
    assert len(taken) < 30
    odd = [*photos[:2], b"no image", *photos[2:]]
    *first, error, third, fourth = loaded.label_stream(odd, k=3, batch_size=5, on_error="yield")
    assert isinstance(error, images.ImageError)
    assert [*first, third, fourth] == loaded.label(photos, k=3)
    with pytest.raises(images.ImageError):
        list(loaded.label_stream([b"no image"]))
    with pytest.raises(ValueError, match="k=0"):  # before the first photo
        loaded.label_stream(endless(), k=0)
    with pytest.raises(ValueError, match="on_error='skip'"):
        loaded.label_stream([], on_error="skip")
    best = loaded.label(photos, k=3, threshold=0.05)
    plain = loaded.label(photos, k=3)
    assert best == [[pair for pair in labels if pair[1] >= 0.05] for labels in plain] != plain
    with pytest.raises(ValueError, match="better when larger"):
        loaded.label(photos[0], ranking="ppl", threshold=0.1)


def test_many_photos_go_on_where_they_stopped(files, loaded, tmp_path, monkeypatch, capsys):
    from vlm_jax import loading, predict
    from vlm_jax.systems.nxtp import command_line

    _, photos, _, _ = files
    monkeypatch.setattr(loading, "load", lambda *_, **__: loaded)
    folder = tmp_path / "photos" / "sub ☕"
    folder.mkdir(parents=True)
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(folder / f"{i}.png")
    odd = folder / os.fsdecode(b"\xff.png")
    odd.write_bytes((folder / "0.png").read_bytes())
    (folder / "bad.png").write_bytes(b"no image")
    out = tmp_path / "labels.jsonl"

    def run(*arguments, out=out):
        predict.main(
            [
                "nxtp",
                "--checkpoint=x",
                "--k=3",
                "--batch_size=2",
                f"--out={out}",
                "--image",
                *map(str, arguments),
            ]
        )
        return [json.loads(line) for line in out.read_text().splitlines()]

    rows = run(folder / "1.png")
    rows = run(tmp_path / "photos")
    assert [row["id"] for row in rows] == [
        str(folder / "1.png"),
        str(odd),
        *(str(folder / f"{i}.png") for i in (0, 2, 3)),
    ]
    expected = loaded.label(photos, k=3)
    for row, labels in zip(rows, [expected[i] for i in (1, 0, 0, 2, 3)]):
        assert [name for name, _ in row["labels"]] == [name for name, _ in labels]
    said = capsys.readouterr().err
    assert "4 inputs done, 1 were there, 1 unreadable" in said and "bad.png: not an image" in said
    assert "bad.png\t" in (tmp_path / "labels.jsonl.failed").read_text()
    with open(out, "a") as stream:
        stream.write('{"id": "cut off')
    assert run(f"{folder}/[0-9].png") == rows
    csv_rows = tmp_path / "labels.csv"
    predict.main(
        ["nxtp", "--checkpoint=x", "--k=3", f"--out={csv_rows}", "--image", str(folder / "0.png")]
    )
    lines = csv_rows.read_text().splitlines()
    assert lines[0] == "id,rank,label,score" and lines[1].split(",")[1:3] == ["1", "chair"]
    for arguments, status, words in (
        (["--k=4", "--image", str(folder)], 2, "k=3 there, 4 now"),
        (["--k=3", "--image", str(folder / "bad.png")], 1, "0 inputs done"),
    ):
        target = out if status == 2 else tmp_path / "other.jsonl"
        with pytest.raises(SystemExit) as stopped:
            predict.main(["nxtp", "--checkpoint=x", f"--out={target}", *arguments])
        assert stopped.value.code == status and words in capsys.readouterr().err
    monkeypatch.setattr(command_line, "_SHOWN", 2)
    predict.main(
        [
            "nxtp",
            "--checkpoint=x",
            "--k=3",
            f"--out={tmp_path / 'made'}",
            "--image",
            str(folder),
            "--num_processes=2",
            "--process_id=1",
        ]
    )
    assert "labels-00001-of-00002.png shows 2 of 3 photos" in capsys.readouterr().out
