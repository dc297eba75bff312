"""Texts to vectors: batching, the cache, MiniLM's published numbers, CLIP's text tower."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.data import records, wheels
from vlm_jax.encoders import text_embedder

GOLDEN = pathlib.Path(__file__).parent / "golden" / "minilm_l6_v2.json"


def letters(texts):
    """Begin 1, a letter each from 3 on, end 2."""
    return [[1, *(ord(letter) - ord("a") + 3 for letter in text), 2] for text in texts]


def counting(shapes, **options):
    def apply(params, tokens_bt, valid_bt):
        shapes.append(tokens_bt.shape)
        kept_bt = tokens_bt * valid_bt
        return jnp.stack([kept_bt.sum(1) * params, kept_bt.max(1), valid_bt.sum(1)], 1) * 1.0

    return text_embedder.TextEmbedder(letters, apply, 1.0, max_tokens=8, **options)


def test_vectors_have_unit_length_and_keep_order():
    embed = counting([])
    vectors = embed(["b", "abc", "b"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    wanted = np.array([1 + 4 + 2, 4, 3]) / np.linalg.norm([7, 4, 3])  # "b" is 1 4 2
    np.testing.assert_allclose(vectors[0], wanted, atol=1e-6)
    np.testing.assert_allclose(embed(["abc"])[0], vectors[1])


def test_buckets_are_powers_of_two_and_each_text_goes_once():
    shapes = []  # grows when a shape is compiled
    embed = counting(shapes, max_batch=4)
    embed(["a", "bb", "c", "a", "dddd", "eee"])  # 3, 4, 3, 6, 5 tokens: the four shortest first
    assert shapes == [(4, 8), (1, 8)]
    embed(["f", "gg", "h"])
    assert shapes == [(4, 8), (1, 8), (4, 4)]
    embed._encode = None
    embed(["a", "dddd", "bb", "h"])  # all kept


def test_long_texts_keep_their_end():
    embed = counting([])
    np.testing.assert_allclose(embed(["abcdefghij"]), embed(["abcdef"]), atol=1e-6)


def test_a_tokenizer_of_another_network_is_refused(tmp_path):
    library = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(9)}
    library.Tokenizer(library.models.WordLevel(words, unk_token="w0")).save(
        str(tmp_path / "tokenizer.json")
    )
    assert text_embedder._tokenize(tmp_path, 9) is not None
    with pytest.raises(records.DataError, match="tokenizer.json has 9 ids, the network beside it"):
        text_embedder._tokenize(tmp_path, 8)


def test_unknown_names():
    for name in ("word2vec", "clip"):
        with pytest.raises(records.DataError, match="known: minilm, minilm:FOLDER, clip:FOLDER"):
            text_embedder.load(name)


@pytest.mark.slow
def test_minilm_gives_the_published_vectors():
    try:
        embed = text_embedder.load("minilm")
    except wheels.DownloadError as error:
        pytest.skip(f"MiniLM cannot be had: {error}")
    golden = json.loads(GOLDEN.read_text())
    vectors = embed([case["text"] for case in golden["cases"]])
    first = [case["embedding_first8"] for case in golden["cases"]]
    np.testing.assert_allclose(vectors[:, :8], first, atol=2e-6)
    np.testing.assert_allclose(vectors @ vectors.T, golden["cosine"], atol=1e-5)
    folder = text_embedder.bert_weights.minilm_folder()
    cfg, _ = text_embedder.bert_weights.load(folder)
    tokenize = text_embedder._tokenize(folder, cfg.vocab_size)
    ids = tokenize([case["text"] for case in golden["cases"]])
    assert ids == [case["input_ids"] for case in golden["cases"]]


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny random CLIP with a word-level tokenizer, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=dict(
            **sizes, vocab_size=20, max_position_embeddings=8, bos_token_id=18, eos_token_id=19
        ),
        vision_config=dict(**sizes, image_size=16, patch_size=8),
        projection_dim=16,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    words = {word: i for i, word in enumerate(["<unk>", "dog", "cat", "traffic", "light"])}
    words |= {"<s>": 18, "</s>": 19}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 18), ("</s>", 19)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path, model


def test_clip_embeds_as_transformers(clip_folder):
    import torch

    folder, model = clip_folder
    embed = text_embedder.load(f"clip:{folder}")
    found = embed(["traffic light", "dog"])
    with torch.no_grad():
        for vector, ids in zip(found, [[18, 3, 4, 19], [18, 1, 19]], strict=True):
            features = model.get_text_features(torch.tensor([ids]))
            features = getattr(features, "pooler_output", features)[0].numpy()
            np.testing.assert_allclose(vector, features / np.linalg.norm(features), atol=1e-5)
