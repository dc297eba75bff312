import base64
import json

import numpy as np
import pytest

from vlm_jax.data import records, sources
from vlm_jax.datasets import visual_sentences


@pytest.fixture
def sentences():
    rng = np.random.default_rng(0)
    return [
        visual_sentences.Sentence(rng.integers(0, 64, 4 * n), n, f"s{n}", "test") for n in (1, 3, 2)
    ]


def test_array_record_round_trip(tmp_path, sentences):
    pytest.importorskip("array_record")
    path = tmp_path / "sub" / "train.array_record"
    assert visual_sentences.write(path, iter(sentences)) == 3
    assert [p.name for p in path.parent.iterdir()] == ["train.array_record"]
    for ours, theirs in zip(visual_sentences.read(path), sentences, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        assert ours.tokens.dtype == np.int32
        assert (ours.num_images, ours.id, ours.source) == (theirs.num_images, theirs.id, "test")
    record = sources.make_source(type="array_record", path=str(path))[0]
    assert record["tokens"] == np.asarray(sentences[0].tokens, "<i4").tobytes()


def test_jsonl_is_the_reference_format(tmp_path, sentences):
    path = tmp_path / "train.jsonl"
    assert visual_sentences.write(path, sentences) == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = np.frombuffer(base64.b64decode(lines[1]["tokens"]), "<i4")
    np.testing.assert_array_equal(found, sentences[1].tokens)


def test_a_bad_sentence_leaves_no_file(tmp_path, sentences):
    sentences.append(visual_sentences.Sentence(np.arange(7), 2, "odd"))
    for name in ("x.jsonl", "x.array_record"):
        with pytest.raises(
            records.DataError, match="sentence 'odd': tokens of shape .7,. are not 2"
        ):
            visual_sentences.write(tmp_path / name, sentences)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "record", [{}, {"tokens": 5}, {"tokens": b"123"}, {"tokens": b"1234", "other": 1}], ids=repr
)
def test_records_that_are_no_sentences(tmp_path, record):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
    writer.write(records.pack(record))
    writer.close()
    with pytest.raises(records.BadRecordError, match=r"x\.array_record:0: not a visual sentence"):
        list(visual_sentences.read(tmp_path / "x.array_record"))
