"""Text tokenizers; the `tokenizers` package is imported only when one is made."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from vlm_jax.data import records

_CONTROL = 3  # ggml token type of special tokens


def from_gguf(metadata: Mapping[str, Any]):
    """The byte-level BPE tokenizer inside a GGUF file.

    Args:
      metadata: of the file, `weights.readers.read(path).metadata`.

    Returns:
      `tokenizers.Tokenizer`. It adds no begin or end token of its own.

    Raises:
      ValueError: another kind of tokenizer, or one whose word splitting is not known here.
      ImportError: the `tokenizers` package is missing.
    """
    kind = metadata.get("tokenizer.ggml.model")
    splitting = metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or splitting != "smollm":
        raise ValueError(
            f"tokenizer {kind!r} with word splitting {splitting!r} is not supported; byte-level "
            "BPE ('gpt2') with the splitting of 'smollm' is"
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    names = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(name, special=True, normalized=False)
            for name, token_type in zip(names, types)
            if token_type == _CONTROL
        ]
    )
    return tokenizer


def from_json(path: str | os.PathLike):
    """The tokenizer of a `tokenizer.json`, of any kind; adds the begin and end tokens it names.

    Padding and cutting that the file asks for are switched off: both are the caller's business.

    Returns:
      `tokenizers.Tokenizer`.

    Raises:
      DataError: no such file, or not one.
      MissingExtraError: the `tokenizers` package is missing.
    """
    library = records.require("tokenizers", "text")
    try:
        tokenizer = library.Tokenizer.from_str(pathlib.Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare exceptions
        raise records.DataError(f"{path}: not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def from_sentencepiece(path: str | os.PathLike):
    """The SentencePiece tokenizer of a `.model` file, as LLaMA 1 and 2 and T5 have.

    Returns:
      `sentencepiece.SentencePieceProcessor`. It adds no begin or end token of its own.

    Raises:
      DataError: no such file, or not one.
      MissingExtraError: the `sentencepiece` package is missing.
    """
    library = records.require("sentencepiece", "text")
    try:
        return library.SentencePieceProcessor(model_proto=pathlib.Path(path).read_bytes())
    except (OSError, RuntimeError) as error:
        raise records.DataError(f"{path}: not a SentencePiece model: {error}") from error
