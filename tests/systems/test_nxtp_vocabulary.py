"""Tokenizers of language models in their several forms, as NXTP's vocabulary."""

import json

import pytest

from vlm_jax.data import records, tokenizers
from vlm_jax.systems.nxtp import vocabulary

library = pytest.importorskip("tokenizers")
WORDS = "dog cat beach house tree person car red blue large the objects in image are items".split()
LABELS = ["dog", "large house", "café", "🐶", "u.s.", "a-b", "<s>", "</s> dog"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of sentences to train on."""
    lines = (f"{a} {b} in the {c}, {b}, {a}." for a in WORDS for b in WORDS for c in WORDS[:3])
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def sentencepiece_file(text):
    """A SentencePiece model with the options of LLaMA 1 and 2."""
    spm = pytest.importorskip("sentencepiece")
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(text.parent / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
    )
    return text.parent / "tokenizer.model"


def pairs_of(file):
    """Vocabulary and merges of a SentencePiece BPE model, as transformers extracts them."""
    spm = pytest.importorskip("sentencepiece")
    model = spm.SentencePieceProcessor(model_file=str(file))
    names = [model.id_to_piece(i) for i in range(model.vocab_size())]
    ids = {name: i for i, name in enumerate(names)}
    merges = [
        (ids[name], name[:cut], name[cut:])
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids
    ]
    return ids, [(a, b) for _, a, b in sorted(merges, key=lambda m: (m[0], ids[m[1]], ids[m[2]]))]


def legacy(tokenizer):
    """Spaces by a normaliser, as in the files of LLaMA 2."""
    norm = library.normalizers
    tokenizer.normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])


def metaspace(tokenizer):
    """Spaces by a splitter, as current transformers save them."""
    tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first", split=False
    )


@pytest.mark.parametrize("form", [legacy, metaspace], ids=lambda form: form.__name__)
def test_sentencepiece_as_json_has_the_same_ids(sentencepiece_file, tmp_path, form):
    ids, merges = pairs_of(sentencepiece_file)
    model = library.models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = library.Tokenizer(model)
    form(tokenizer)
    dec = library.decoders
    tokenizer.decoder = dec.Sequence(
        [dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = vocabulary.load(str(tmp_path)), vocabulary.load(str(sentencepiece_file))
    for field in ("size", "image_id", "bos_id", "eos_id", "delimiter_id"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for prompt in vocabulary.PROMPTS:
        for labels in ([], ["dog"], LABELS[:5], LABELS[::-1], *([label] for label in LABELS)):
            for closed in (True, False):
                row = ours.text(prompt, labels, closed=closed)
                assert row == theirs.text(prompt, labels, closed=closed), (prompt, labels)
    assert ours.decode(row) == theirs.decode(row)


def byte_level(text, folder, special, **config):
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(text)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    return tokenizer


@pytest.mark.parametrize(
    "special, config, begin, end",
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], {}, 0, 1),
        (
            ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
            dict(bos_token={"content": "<|begin_of_text|>"}, eos_token="<|eot_id|>"),
            0,
            2,
        ),
        (["<|endoftext|>"], {}, 0, 0),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], dict(bos_token=None), 1, 2),
        (["<pad>", "<eos>", "<bos>"], {}, 2, 1),
        (["<A>", "<B>", "<s>", "</s>"], dict(bos_token="<A>", eos_token="<B>"), 0, 1),
    ],
    ids=["llama3", "llama3 instruct", "gpt2", "chatml", "gemma", "named"],
)
def test_begin_and_end(text, tmp_path, special, config, begin, end):
    tokenizer = byte_level(text, tmp_path, special, **config)
    words = vocabulary.load(str(tmp_path))
    assert (words.bos_id, words.eos_id) == (begin, end)
    assert words.size == tokenizer.get_vocab_size() + 2
    row = words.text(vocabulary.PROMPTS[0], ["dog", "large house"], closed=True)
    assert words.decode(row) == "The objects in the image are dog, large house,"
    # A special token inside a label is text.
    row = words.text(vocabulary.PROMPTS[0], [special[0]], closed=True)
    assert begin not in row[2:] and special[0] in words.decode(row)


def test_a_byte_order_mark_is_no_error(text, tmp_path):
    byte_level(text, tmp_path, ["<s>", "</s>"])
    file = tmp_path / "bom.json"
    file.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "tokenizer.json").read_bytes())
    assert vocabulary.load(str(file)).size == vocabulary.load(str(tmp_path)).size


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    (b"<html></html>", "is a web page"), (b"{" * 100_000, "not a "),
    (b"\xff\xfe\x00", "not a"), (b"[1]", "not a"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_what_is_there_instead_of_a_tokenizer(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(records.DataError, match=message):
        vocabulary.load(str(tmp_path))


def test_ids_with_a_hole_are_refused(text, tmp_path):
    byte_level(text, tmp_path, ["<s>", "</s>"])
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | dict(id=5000, content="<pad>"))
    file.write_text(json.dumps(content))
    with pytest.raises(records.DataError, match="'<pad>' has the id 5000"):
        vocabulary.load(str(tmp_path))


def test_an_empty_folder_and_a_bad_neighbour(text, tmp_path):
    with pytest.raises(records.DataError, match="neither tokenizer.model nor tokenizer.json"):
        vocabulary.load(str(tmp_path))
    byte_level(text, tmp_path, ["<s>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text("[3]")
    with pytest.raises(records.DataError, match="tokenizer_config.json"):
        vocabulary.load(str(tmp_path))


GGML = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [1, 1, 1],
}  # fmt: skip


def test_the_tokenizer_inside_a_gguf_file():
    assert tokenizers.from_gguf(GGML).encode("ab").ids == [2]


@pytest.mark.parametrize("key, value", [
    ("tokens", None), ("tokens", [1, 2, 3]), ("tokens", ["a", "a", "ab"]), ("tokens", "abc"),
    ("tokens", ["\ufffd", "\ufffd", "ab"]), ("merges", ["ab"]), ("merges", [3]), ("merges", 7),
    ("token_type", [1]), ("token_type", None), ("model", 3),
])  # fmt: skip
def test_gguf_tokenizers_of_wrong_types(key, value):
    with pytest.raises(records.DataError):
        tokenizers.from_gguf(GGML | {f"tokenizer.ggml.{key}": value})


def test_mutated_tokenizers_are_read_or_named(text, sentencepiece_file, tmp_path):
    import numpy as np

    byte_level(text, tmp_path, ["<s>", "</s>"])
    rng = np.random.default_rng(0)
    for source, count in ((tmp_path / "tokenizer.json", 60), (sentencepiece_file, 200)):
        content = source.read_bytes()
        for i in range(count):
            changed = bytearray(content)
            for place in rng.integers(len(content), size=3):
                changed[place] = rng.integers(256)
            file = tmp_path / f"{i}{source.suffix}"
            file.write_bytes(changed[: None if i % 4 else int(rng.integers(len(content)))])
            try:
                vocabulary.load(str(file))
            except records.DataError:
                pass
