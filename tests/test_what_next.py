"""The last lines of a run."""

from vlm_jax.program import what_next


def test_lines(tmp_path):
    (tmp_path / "eval/00000007/samples").mkdir(parents=True)
    picture = tmp_path / "eval/00000007/samples/samples.png"
    picture.touch()
    (tmp_path / "curves.png").touch()
    assert what_next.lines(tmp_path, "lvm", 7) == [
        f"checkpoint: {tmp_path}/checkpoints/7",
        f"curves: {tmp_path}/curves.png",
        f"picture: {picture}",
        f"next: python -m vlm_jax.predict lvm --checkpoint={tmp_path} --continue a.png b.png",
    ]
    assert what_next.lines(tmp_path, "somebody.elses", 8) == [
        f"checkpoint: {tmp_path}/checkpoints/8",
        f"curves: {tmp_path}/curves.png",
    ]
