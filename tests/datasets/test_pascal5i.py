import numpy as np
import pytest
from PIL import Image

from tests import fuzz
from vlm_jax.data import records, sources
from vlm_jax.datasets import pascal5i


def write_voc(root):
    """Four images of 8 x 10: cats (8) in a, b, d; a bird (3) in a and c; void pixels in c."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "Annotations"):
        (root / name).mkdir(parents=True)
    masks = {name: np.zeros((8, 10), np.uint8) for name in "abcd"}
    masks["a"][0:2, 0:3], masks["a"][4:6, 4:6] = 8, 3
    masks["b"][1:4, 1:4] = 8
    masks["c"][:, 0:2], masks["c"][:, 2] = 3, 255
    masks["d"][7, 9] = 8
    for value, (name, mask) in enumerate(masks.items()):
        picture = np.full((8, 10, 3), 40 * value, np.uint8)
        Image.fromarray(picture).save(root / "JPEGImages" / f"{name}.jpg")
        image = Image.fromarray(mask, mode="L").convert("P")
        image.putpalette([i for k in range(256) for i in (k, 0, 255 - k)])
        image.putdata(mask.ravel().tolist())
        image.save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("a\nb\nc\nd\n")
    boxes = {
        "a": [("cat", 1, 1, 3, 2), ("bird", 5, 5, 6, 6)],
        "b": [("cat", 2, 2, 4, 4)],
        "c": [("bird", 1, 1, 2, 8)],
        "d": [("cat", 1, 1, 10, 7)],  # 70 of 80 pixels
    }
    for name, found in boxes.items():
        objects = "".join(
            f"<object><name>{kind}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
            f"<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part></object>"
            for kind, x0, y0, x1, y1 in found
        )
        size = "<size><width>10</width><height>8</height><depth>3</depth></size>"
        text = f"<annotation>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    return masks


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    write_voc(root)
    return root


def make(path, **fields):
    return sources.make_source(type="pascal5i", path=str(path), **fields)


def names(source):
    return [source.record_id(i) for i in range(len(source))]


def test_folds_and_masks(voc):
    assert names(make(voc)) == ["a/bird", "a/cat", "b/cat", "c/bird", "d/cat"]
    fold0, fold1 = make(voc, fold=0), make(voc.parent.parent, fold=1)
    assert names(fold0) == ["a/bird", "c/bird"]
    assert names(fold1) == ["a/cat", "b/cat", "d/cat"]
    np.testing.assert_array_equal(fold1.labels, [8, 8, 8])
    record = fold1[0]
    assert (record["label"], record["fold"], record["name"]) == (8, 1, "cat")
    assert record["image_u8"].shape == (8, 10, 3) and record["mask"].sum() == 6
    assert record["mask"][0:2, 0:3].all()
    assert fold0[1]["mask"].sum() == 16  # without the void column


def test_boxes_of_single_objects(voc):
    source = make(voc, kind="box")
    assert names(source) == ["b/cat", "c/bird"]  # a has two objects, that of d is too large
    mask = source[0]["mask"]
    assert mask.sum() == 9 and mask[1:4, 1:4].all()


def test_pairs_are_of_the_same_class(voc):
    fields = dict(type="few_shot", answer="mask", shots=2)
    source = sources.make_source(
        **fields, queries=dict(type="pascal5i", path=str(voc), fold=1), seed=3
    )
    record = source[1]
    assert len(record["prompt"]) == 5 and len(record["target"]) == 1
    assert (record["label"], record["fold"], record["id"]) == (8, 1, "b/cat")
    # The query is b, so the pairs are a and d in some order: 6 white pixels and 1.
    white = sorted(int((record["prompt"][i][..., 0] == 255).sum()) for i in (1, 3))
    assert white == [1, 6]
    assert int((record["target"][0][..., 0] == 255).sum()) == 9
    for first, second in zip(record["prompt"], source[1]["prompt"]):
        np.testing.assert_array_equal(first, second)
    with pytest.raises(records.DataError, match="label 3: 2 records cannot give 2 examples"):
        sources.make_source(**fields, queries=dict(type="pascal5i", path=str(voc)))


def test_the_larger_set_of_masks_is_preferred(voc):
    (voc / "SegmentationClassAug").mkdir()
    for name in "abcd":
        Image.fromarray(np.full((8, 10), 20, np.uint8)).save(
            voc / "SegmentationClassAug" / f"{name}.png"
        )
    assert names(make(voc)) == [f"{name}/tvmonitor" for name in "abcd"]


def test_what_is_missing_is_named(voc, tmp_path):
    with pytest.raises(records.DataError, match="VOCtrainval_11-May-2012.tar"):
        make(tmp_path / "none")
    with pytest.raises(records.DataError, match="fold=4"):
        make(voc, fold=4)
    with pytest.raises(records.DataError, match="fold 3 of 'val' is empty"):
        make(voc, fold=3)
    with pytest.raises(records.DataError, match=r"train\.txt does not exist"):
        make(voc, split="train")
    (voc / "SegmentationClass" / "c.png").unlink()
    (voc / "ImageSets" / "Segmentation" / "other.txt").write_text("c")
    with pytest.raises(records.DataError, match=r"c\.png does not exist"):
        make(voc, split="other")
    Image.new("RGB", (10, 8)).save(voc / "SegmentationClass" / "c.png")
    with pytest.raises(records.DataError, match="one channel of class numbers"):
        make(voc, split="other")


@pytest.mark.parametrize("name", ["../a", "..", "x/a", "/etc/passwd"])
def test_lists_name_images_of_the_data_set_only(voc, name):
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text(f"a\n{name}\n")
    with pytest.raises(records.DataError, match="no name of an image"):
        sources.make_source(type="pascal5i", path=str(voc))


@pytest.mark.parametrize("text", ["x", "1e999", "nan", "", "9" * 5000])
def test_boxes_that_are_no_numbers(voc, text):
    path = voc / "Annotations" / "b.xml"
    path.write_text(path.read_text().replace("<xmin>2", f"<xmin>{text}", 1))
    with pytest.raises(records.DataError, match=r"b\.xml: not the numbers of a box"):
        sources.make_source(type="pascal5i", path=str(voc), kind="box")


def test_damaged_masks_and_annotations(voc):
    for kind, path in (
        ("mask", voc / "SegmentationClass" / "b.png"),
        ("box", voc / "Annotations" / "b.xml"),
    ):
        whole = path.read_bytes()
        for content in fuzz.mutations(whole, 100):
            path.write_bytes(content)
            pascal5i._list_items.cache_clear()
            with fuzz.bounded(megabytes=64):
                try:
                    source = sources.make_source(type="pascal5i", path=str(voc), kind=kind)
                    assert all(source[i]["mask"].dtype == bool for i in range(len(source)))
                except records.DataError:
                    pass
