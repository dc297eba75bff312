"""LVM's command line on a model that repeats its last image."""

import numpy as np
import pytest
from PIL import Image

from vlm_jax import predict
from vlm_jax.data import images
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
