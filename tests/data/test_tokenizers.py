"""Tokenizers from tokenizer.json."""

import json

import pytest

from vlm_jax.data import records, tokenizers

library = pytest.importorskip("tokenizers")


def test_from_json_neither_pads_nor_cuts(tmp_path):
    words = {"[UNK]": 0, "dog": 1, "##s": 2, "cat": 3}
    made = library.Tokenizer(library.models.WordPiece(words, unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    made.enable_padding(length=8)
    made.enable_truncation(2)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.from_json(tmp_path / "tokenizer.json")
    assert tokenizer.encode("dogs cat emu").ids == [1, 2, 3, 0]


def test_from_json_names_a_file_that_is_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(records.DataError, match="tokenizer.json: not a tokenizer"):
        tokenizers.from_json(tmp_path / "tokenizer.json")
    with pytest.raises(records.DataError, match="missing.json"):
        tokenizers.from_json(tmp_path / "missing.json")


def test_two_tokens_of_one_id(tmp_path):
    vocab = {"a": 0, "b": 1, "unk": 2}
    content = json.loads(library.Tokenizer(library.models.WordLevel(vocab, "unk")).to_str())
    content["model"]["vocab"]["twice"] = 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(records.DataError, match="2 tokens have the id 1"):
        tokenizers.from_json(tmp_path / "tokenizer.json")
