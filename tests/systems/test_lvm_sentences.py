"""Sentences by number, told by the names of files; nothing is decoded."""

import json
import os
import pathlib
import unicodedata

import pytest

from vlm_jax.data import records
from vlm_jax.systems.lvm import sentences


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return str(root)


def make(layout, root, **fields):
    return sentences.make(sentences.Options(layout, str(root), **fields))


def names(plan, number, root):
    """Paths relative to the root, with frames and edits."""
    return [
        os.path.relpath(picture.path, root)
        + (f"@{picture.frame}" if picture.frame >= 0 else "")
        + "".join(f"+{edit[0]}" for edit in picture.edits)
        for picture in plan.draw(number)
    ]


def test_single(tmp_path):
    root = fill(tmp_path, "a.jpg", "b/1.jpg", "b/2.jpg")
    plan = make("single", root, epochs=2)
    assert plan.count == 6 and plan.images == 1 and plan.files == 3
    assert [names(plan, n, root)[0] for n in range(4)] == ["a.jpg", "b/1.jpg", "b/2.jpg", "a.jpg"]


def test_names_in_any_encoding(tmp_path):
    composed, apart = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    odd = os.fsdecode(b"\xff.png")
    root = fill(tmp_path / "photos", apart, odd)
    assert make("single", root).files == 2
    things = [
        {"image": composed, "objects": [{"label": 1, "box": [0, 0, 2, 2]}]},
        {"image": odd, "objects": [{"label": 2, "box": [0, 0, 2, 2]}]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(things))
    plan = make("pairs", root, images=4, annotations=(f"{tmp_path / 'a.json'}:boxes",))
    assert {picture.drawn[1] for picture in plan.draw(0) if picture.drawn} == {composed, odd}


def test_frame_folders(tmp_path):
    root = fill(tmp_path, *(f"{c}/{n}.png" for c in "xy" for n in range(12)), "short/0.png")
    plan = make("frames", root, images=4, max_stride=3)
    assert plan.count == 3
    for number, clip in ((1, "x"), (2, "y")):
        found = [int(name.split("/")[1][:-4]) for name in names(plan, number, root)]
        assert {name.split("/")[0] for name in names(plan, number, root)} == {clip}
        (stride,) = {b - a for a, b in zip(found, found[1:])}
        assert 1 <= stride <= 3
    assert names(plan, 1, root) == names(plan, 1, root)
    with pytest.raises(records.BadRecordError, match=r"/short: 1 frames cannot give 4 images"):
        plan.draw(0)


def test_rotation(tmp_path):
    root = fill(tmp_path, *(f"chair/{n}.png" for n in range(24)))
    plan = make("rotation", root, stride=(1, 5))
    assert plan.count == 2 and plan.images == 16
    for number, step in ((0, 1), (1, 5)):
        views = [int(name[6:-4]) for name in names(plan, number, root)]
        assert {(b - a) % 24 for a, b in zip(views, views[1:])} == {step}


def test_category(tmp_path):
    root = fill(tmp_path, *(f"{c}/{n}.png" for c in "abcd" for n in range(4)))
    plan = make("category", root, images=8, per_class=(4, 2))
    assert plan.count == 4  # 16 files, 8 a sentence, two passes
    for number, size in ((0, 4), (1, 4), (2, 2), (3, 2)):
        found = [name[0] for name in names(plan, number, root)]
        assert all(len(set(found[at : at + size])) == 1 for at in range(0, 8, size))
    for fields, message in (
        (dict(images=8, per_class=(8,)), "0 classes have 8 images, needs 1"),
        (dict(images=8, per_class=(3,)), "per_class=3 does not divide --images=8"),
    ):
        with pytest.raises(records.DataError, match=message):
            make("category", root, **fields)


def test_pairs(tmp_path):
    photos = fill(tmp_path / "photo", *(f"{n}.jpg" for n in range(5)))
    depth = fill(tmp_path / "depth", *(f"{n}.png" for n in range(5)))
    plan = make("pairs", photos, annotations=(depth,), images=4, epochs=2)
    assert plan.count == 4  # two groups of two an epoch, one left over
    seen = []
    for number in range(4):
        x1, y1, x2, y2 = names(plan, number, tmp_path)
        assert y1 == x1.replace("photo", "depth").replace("jpg", "png")
        assert y2 == x2.replace("photo", "depth").replace("jpg", "png")
        seen.append({x1, x2})
    assert not seen[0] & seen[1] and not seen[2] & seen[3] and seen[0] != seen[2]
    with pytest.raises(records.DataError, match="5 files are too few for one sentence"):
        make("pairs", photos, annotations=(depth,))


def test_colorization_and_inpainting(tmp_path):
    root = fill(tmp_path, *(f"{n}.jpg" for n in range(4)))
    for layout, edit in (("colorization", "grey"), ("inpainting", "hide")):
        plan = make(layout, root, images=8)
        found = names(plan, 0, root)
        assert found[::2] == [f"{name}+{edit}" for name in found[1::2]]
        assert sorted(found[1::2]) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"] and plan.count == 1


def test_several_annotations(tmp_path):
    kinds = ("photo", "depth", "edge")
    photo, *others = (fill(tmp_path / k, *(f"{n}.jpg" for n in range(6))) for k in kinds)
    plan = make("multi", photo, annotations=tuple(others), shots=3)
    assert plan.count == 2 and plan.images == 9
    orders = set()
    for number in range(20):  # numbers beyond the first epoch are of the next ones
        found = [name.split("/") for name in names(plan, number, tmp_path)]
        order = tuple(kind for kind, _ in found[:3])
        assert [kind for kind, _ in found] == list(order) * 3
        assert [len({name for _, name in found[at : at + 3]}) for at in (0, 3, 6)] == [1, 1, 1]
        orders.add(order)
    assert len(orders) == 6
    assert make("multi", photo, annotations=tuple(others), elements=2).images == 6
    with pytest.raises(records.DataError, match="elements=4 of an image with 2 annotations"):
        make("multi", photo, annotations=tuple(others), elements=4)


def test_annotated_video(tmp_path):
    frames = [f"{c}/{n}.jpg" for c in ("u", "v") for n in range(9)]
    video, flow = (fill(tmp_path / kind, *frames) for kind in ("video", "flow"))
    plan = make("annotated_video", video, annotations=(flow,), frames=3, clips=2)
    assert plan.count == 2 and plan.images == 12
    blocks, mixed = names(plan, 0, tmp_path), names(plan, 1, tmp_path)
    for at in (0, 6):
        f, a = blocks[at : at + 3], blocks[at + 3 : at + 6]
        assert a == [name.replace("video", "flow") for name in f]
        assert mixed[at : at + 6] == [name for pair in zip(f, a) for name in pair]
    assert {name.split("/")[1] for name in blocks} == {"u", "v"}
    only = make(
        "annotated_video", video, annotations=(flow,), frames=3, clips=1, order="interleaved"
    )
    assert only.count == 2 and names(only, 0, tmp_path)[1].startswith("flow/")


def test_co3d(tmp_path):
    for thing in ("cup/1", "cup/2"):
        for kind, end in (("images", ".jpg"), ("masks", ".png"), ("depth_masks", ".png")):
            fill(tmp_path, *(f"{thing}/{kind}/frame{n}{end}" for n in range(6)))
    plan = make("co3d", tmp_path, clips=2)
    assert plan.count == 2 and plan.images == 16
    for number, kind in ((0, "masks"), (1, "depth_masks")):
        found = names(plan, number, tmp_path)
        for at in (0, 8):
            rgb, masks = found[at : at + 4], found[at + 4 : at + 8]
            assert masks == [n.replace("images", kind).replace("jpg", "png") for n in rgb]
            assert rgb == sorted(set(rgb))
    assert names(plan, 0, tmp_path)[:4] == names(plan, 1, tmp_path)[:4]
    with pytest.raises(records.DataError, match="no object folder holds a folder 'images'"):
        make("co3d", tmp_path / "cup" / "1" / "masks")


def test_drawn_annotations(tmp_path):
    root = fill(tmp_path / "photo", "a.jpg", "sub/b.jpg", "c.jpg")
    path = tmp_path / "x.json"
    objects = [{"label": 1, "box": [0, 0, 1, 1]}]
    images = [{"image": name, "objects": objects} for name in ("a.jpg", "b.jpg")]
    path.write_text(json.dumps([*images, {"image": "c.jpg", "objects": []}]))
    plan = make("pairs", root, annotations=(f"{path}:boxes",), images=4)
    assert plan.notes == ["1 of 3 images have nothing to draw: left out"]
    drawn = {(p.path.rsplit("/")[-1], p.drawn) for p in plan.draw(0)}
    assert drawn == {
        ("a.jpg", ()),
        ("b.jpg", ()),
        ("a.jpg", (f"{path}:boxes", "a.jpg")),
        ("b.jpg", (f"{path}:boxes", "b.jpg")),
    }
    fill(tmp_path / "photo", "d.jpg")
    with pytest.raises(records.DataError, match=r"x\.json: says nothing about .*d\.jpg"):
        make("pairs", root, annotations=(f"{path}:boxes",), images=4)


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("zigzag", {}, "no layout 'zigzag'; there are annotated_video, category"),
        ("single", dict(stride=(8,)), "layout 'single' takes no --stride"),
        ("single", dict(annotations=("x",)), "layout 'single' takes no --annotations"),
        ("pairs", {}, "takes exactly one of --annotations"),
        ("multi", {}, "takes one or more --annotations"),
        ("pairs", dict(annotations=("x",)), "x: give annotations as a folder, or as FILE.json"),
        ("colorization", dict(images=7), "--images=7 is odd"),
        ("frames", dict(max_stride=0), "--max_stride=0 must be at least 1"),
        ("rotation", dict(stride=(0,)), r"--stride=\(0,\) must be at least 1"),
        ("video", {}, "holds no file that ends with .mp4"),
    ],
)
def test_options_that_cannot_work(tmp_path, layout, fields, message):
    root = fill(tmp_path, *(f"c/{n}.jpg" for n in range(4)))
    with pytest.raises(records.DataError, match=message):
        make(layout, root, **fields)


def test_another_file_is_another_digest(tmp_path):
    root = fill(tmp_path, "1.jpg", "2.jpg")
    before = make("single", root).digest
    assert make("single", root).digest == before
    fill(tmp_path, "3.jpg")
    assert make("single", root).digest != before


def test_the_readme_names_every_layout():
    text = (pathlib.Path(sentences.__file__).parent / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in sentences.LAYOUTS)
