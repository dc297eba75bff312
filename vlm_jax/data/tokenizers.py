"""Text tokenizers; the `tokenizers` package is imported only when one is made."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_jax.data import file_kind, records

_CONTROL = 3  # ggml token type of special tokens


def from_gguf(metadata: Mapping[str, Any]):
    """The byte-level BPE tokenizer inside a GGUF file.

    Args:
      metadata: of the file, `weights.readers.read(path).metadata`.

    Returns:
      `tokenizers.Tokenizer`. It adds no begin or end token of its own.

    Raises:
      DataError: another kind of tokenizer, one whose word splitting is not known here, or
        metadata that make none.
      MissingExtraError: the `tokenizers` package is missing.
    """
    kind = metadata.get("tokenizer.ggml.model")
    splitting = metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or splitting != "smollm":
        raise records.DataError(
            f"tokenizer {kind!r} with word splitting {splitting!r} is not supported; byte-level "
            "BPE ('gpt2') with the splitting of 'smollm' is"
        )
    records.require("tokenizers", "text")
    with named_errors("the tokenizer of the GGUF file"):
        return _byte_level(
            *(metadata[f"tokenizer.ggml.{part}"] for part in ("tokens", "merges", "token_type"))
        )


@contextlib.contextmanager
def named_errors(what: str | os.PathLike) -> Iterator[None]:
    """Whatever goes wrong inside becomes a DataError, "WHAT: not a tokenizer: ...".

    The libraries raise bare exceptions, and panics of theirs are not even `Exception`s.
    """
    try:
        yield
    except (records.DataError, records.MissingExtraError):
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise records.DataError(f"{what}: not a tokenizer: {error}") from error


def _byte_level(names: list[str], merges: list[str], types: list[int]):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if not (isinstance(names, list) and isinstance(merges, list)):
        raise TypeError("tokens and merges must be lists")
    vocab = {name: token_id for token_id, name in enumerate(names)}
    if len(vocab) != len(names) or len(types) != len(names):
        raise ValueError(f"{len(vocab)} names and {len(types)} types of {len(names)} tokens")
    pairs: list[Any] = [tuple(pair.split(" ", 1)) for pair in merges]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
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
    with named_errors(path):
        if reason := file_kind.not_data(path):
            raise records.DataError(f"{path} {reason}")
        # With or without a byte order mark.
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
        tokenizer = library.Tokenizer.from_str(text)
        _require_own_ids(tokenizer, json.loads(text), path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def num_ids(tokenizer: Any) -> int:
    """One more than the largest id of a `tokenizers.Tokenizer`; some numbers may be missing."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def marks_spaces(tokenizer: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` writes spaces as SentencePiece does, "▁" before a word."""
    if tokenizer.decoder is None:
        return False
    return "▁" in json.dumps(json.loads(tokenizer.decoder.__getstate__()), ensure_ascii=False)


def _require_own_ids(tokenizer: Any, content: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Refuses added tokens that the library numbers anew: where ids before theirs are missing.

    And two tokens of one id, of which only one could be decoded.
    """
    counts = collections.Counter(tokenizer.get_vocab(with_added_tokens=True).values())
    if twice := [token_id for token_id, count in counts.items() if count > 1]:
        raise records.DataError(f"{path}: {counts[twice[0]]} tokens have the id {twice[0]}")
    for token in content.get("added_tokens", ()):
        if (own := tokenizer.token_to_id(token["content"])) != token["id"]:
            raise records.DataError(
                f"{path}: the added token {token['content']!r} has the id {token['id']}, which the "
                f"package tokenizers makes {own}: there are ids missing before it. Give the added "
                "tokens the ids behind the others"
            )


def special_tokens(path: str | os.PathLike) -> dict[str, str]:
    """The tokens that the tokenizer_config.json beside a tokenizer names: "bos_token", ...

    Raises:
      DataError: such a file is there and is not JSON.
    """
    file = pathlib.Path(path).parent / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        fields = dict(json.loads(file.read_text(encoding="utf-8-sig")))
    except (ValueError, TypeError, RecursionError) as error:
        raise records.DataError(f"{file}: {error}") from error
    # Text, or the fields of a token.
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in fields.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


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
        if reason := file_kind.not_data(path):
            raise records.DataError(f"{path} {reason}")
        return library.SentencePieceProcessor(model_proto=pathlib.Path(path).read_bytes())
    except (OSError, RuntimeError) as error:
        raise records.DataError(f"{path}: not a SentencePiece model: {error}") from error
