"""The demo photos with labels: splits, the cap on frequent classes, hand-made labels."""

import collections
import pickle

import pytest

from vlm_jax.data import records, sources


def classes(source):
    return collections.Counter(source[i]["labels"][0] for i in range(len(source)))


def test_tiny_photos_are_capped(demo_data):
    everything = sources.make_source(type="labelled_photos", split="all", cap=0)
    assert len(everything) == 500 and classes(everything)["military uniform"] == 91
    train = sources.make_source(type="labelled_photos")
    counts = classes(train)
    assert counts["military uniform"] == max(counts.values()) == 20
    uncapped = classes(sources.make_source(type="labelled_photos", cap=0))
    assert all(counts[name] == min(20, count) for name, count in uncapped.items())
    record = train[0]
    assert record["image_u8"].shape == (64, 64, 3) and record["id"] == train.record_id(0)
    assert all(name == name.lower() for name in counts)


def test_splits_do_not_overlap(demo_data):
    ids = {}
    for split in ("train", "heldout"):
        source = sources.make_source(type="labelled_photos", split=split, cap=0, photos="both")
        ids[split] = {source.record_id(i) for i in range(len(source))}
        assert all(source[i]["split"] == split for i in range(len(source)))
    assert not ids["train"] & ids["heldout"]
    assert len(ids["train"]) + len(ids["heldout"]) == 528


def test_rare_classes_can_be_left_out(demo_data):
    source = sources.make_source(type="labelled_photos", split="all", cap=0, min_images=4)
    assert len(source) == 373 and len(classes(source)) == 31


def test_large_photos_have_several_labels(demo_data):
    source = sources.make_source(type="labelled_photos", split="heldout", photos="large")
    by_id = {source.record_id(i): source[i] for i in range(len(source))}
    assert by_id["coffee"]["labels"] == ["cup", "saucer", "spoon", "coffee", "table"]
    captions = sources.make_source(
        type="labelled_photos", split="heldout", photos="large", text="captions"
    )
    assert "labels" not in captions[0] and len(captions[0]["captions"]) == 3
    assert pickle.loads(pickle.dumps(captions))[0]["captions"] == captions[0]["captions"]


def test_unknown_choices():
    for fields, message in (
        (dict(split="val"), "split='val' is none of train, heldout, all"),
        (dict(photos="huge"), "photos='huge' is none of tiny, large, both"),
        (dict(text="nouns"), "text='nouns' is none of"),
        (dict(text="captions"), "only the large photos have captions"),
        (dict(classes=3), "labelled_photos"),
    ):
        with pytest.raises(records.DataError, match=message):
            sources.make_source(type="labelled_photos", **fields)
