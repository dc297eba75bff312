"""LVM's command line on a model that repeats its last image."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from vlm_jax import predict
from vlm_jax.data import images
from vlm_jax.systems.lvm import command_line
from vlm_jax.systems.lvm import model as model_lib


class Repeater(model_lib.Lvm):
    """Remembers its prompt."""

    def __init__(self, context_images=4):
        self.context_images = context_images
        self.prompts = []

    def continue_(self, frames, n=1, *, candidates=1, **_):
        self.prompts.append(frames)
        last = images.resize(frames[-1], 16)
        return np.broadcast_to(last, (candidates, n, 16, 16, 3))


@pytest.fixture
def run(tmp_path, monkeypatch):
    model = Repeater()
    monkeypatch.setattr("vlm_jax.loading.load", lambda *_, **__: model)

    def call(*arguments):
        predict.main(["lvm", "--checkpoint=x", f"--out={tmp_path / 'out'}", *map(str, arguments)])
        return tmp_path / "out"

    call.model = model
    return call


def photos(folder, count):
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((20, 30, 3), 9 * number, np.uint8)).save(path)
    return paths


def test_a_file_in_place_of_the_folder_is_refused_first(run, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        run("--continue", *photos(tmp_path, 1), "--continue", *photos(tmp_path, 2))
    assert stopped.value.code == 2 and "out is a file; give a folder" in capsys.readouterr().err
    assert not run.model.prompts and (tmp_path / "out").read_text() == "mine"


def test_what_is_not_used_is_said(run, tmp_path, capsys):
    paths = photos(tmp_path, 5)
    out = run("--continue", *paths, "--n=2", "--candidates=3", "--resize_output=original")
    assert [int(image[0, 0, 0]) for image in run.model.prompts[0]] == [18, 27, 36]
    assert "the first 2 of 5 images do not fit" in capsys.readouterr().out
    assert len(list(out.glob("candidate_*"))) == 6
    assert images.decode(out / "candidate_2_frame_1.png").shape == (20, 30, 3)
    run("--pair", *paths[:2], "--pair", *paths[2:4], f"--query={paths[4]}")
    assert [int(image[0, 0, 0]) for image in run.model.prompts[1]] == [18, 27, 36]
    assert images.decode(out / "candidate_0_frame_0.png").shape == (16, 16, 3)


def test_a_batch_file_goes_on_where_it_stopped(run, tmp_path, monkeypatch, capsys):
    paths = photos(tmp_path, 5)
    monkeypatch.setattr(command_line, "_CHUNK", 2)
    run.model.tokenizer = types.SimpleNamespace(side=16)
    lines = [
        {"input": [path.name], "output": f"{i}.png", "target": [paths[0].name]}
        for i, path in enumerate(paths)
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))

    def once(prompts, *arguments, **options):
        if len(run.model.prompts) == 1:
            raise KeyboardInterrupt
        run.model.prompts.append(len(prompts))
        return [np.tile(images.resize(p[-1], 16), (4, 1, 1, 1, 1)) for p in prompts]

    monkeypatch.setattr(run.model, "continue_", once)
    with pytest.raises(SystemExit) as stopped:
        run(f"--jsonl={file}")
    assert stopped.value.code == 130
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.png")) == ["0.png", "1.png"]
    run.model.prompts.append(0)
    run(f"--jsonl={file}")
    assert run.model.prompts == [2, 0, 2, 1]
    said = capsys.readouterr().out
    assert "2 of 5 lines are there from last time" in said and "wrote 5 pictures" in said
    assert "over 5 lines" in said
    assert sorted(path.name for path in out.iterdir()) == [f"{i}.png" for i in range(5)]


def test_a_batch_file_says_what_is_not_used_and_fades_it(run, tmp_path, monkeypatch, capsys):
    paths = photos(tmp_path, 5)
    run.model.tokenizer = types.SimpleNamespace(side=16)
    prompts = []

    def once(found, *_, candidates, **__):
        prompts.extend(found)
        return [np.tile(images.resize(p[-1], 16), (candidates, 1, 1, 1, 1)) for p in found]

    monkeypatch.setattr(run.model, "continue_", once)
    lines = [
        {"input": [path.name for path in paths], "output": "long.png"},
        {"input": [paths[0].name], "output": "short.png"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    out = run(f"--jsonl={file}", "--candidates=1", "--show_inputs")
    assert "1 of 2 lines have more images than fit" in capsys.readouterr().out
    assert [len(prompt) for prompt in prompts] == [3, 1]
    shown = images.decode(out / "long.png")[8, 8::16, 0]
    assert shown.tolist() == [192, 192 + 9 // 4, 18, 27, 36, 36]


def test_videos_are_prompts(run, tmp_path, capsys):
    av = pytest.importorskip("av")
    path = tmp_path / "a:b.mp4"
    with av.open(f"file:{path}", "w") as container:
        track = container.add_stream("mpeg4", rate=10)
        track.width, track.height, track.pix_fmt = 32, 32, "yuv420p"
        for number in range(20):
            grey = np.full((32, 32, 3), 10 * number, np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(track.encode())
    still = photos(tmp_path, 1)[0]
    run("--continue", path, still, "--clip_start=1", "--clip_stride=6", "--clip_frames=2")
    seen = [round(float(image.mean()) / 10) for image in run.model.prompts[0]]
    assert seen == [1, 7, 0]

    def fails(*arguments):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "a pair is of images" in fails("--pair", path, path, "--query", still)
    assert "cannot be so small" in fails("--continue", path, "--clip_stride=0")
    assert "no frame at or after 50" in fails("--continue", path, "--clip_start=50")
    assert "WIDTH,HEIGHT" in fails("--continue", still, "--resize_output=big")
