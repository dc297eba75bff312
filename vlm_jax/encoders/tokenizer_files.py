"""Files of text tokenizers: SentencePiece `.model`, `tokenizer.json`, `.gguf`; read and written."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from vlm_jax.data import records, tokenizers, wheels

# Of files that do not say which tokens begin and end a text, in this order.
_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "<|im_start|>", "<|endoftext|>", "[CLS]")
_ENDS = ("</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|endoftext|>", "[SEP]")


@dataclasses.dataclass(frozen=True)
class Found:
    """A tokenizer as its library makes it.

    Attributes:
      tokenizer: a `SentencePieceProcessor` or a `tokenizers.Tokenizer`.
      name: of the file.
      bos_id, eos_id: begin and end of a text; None where the file does not tell.
      num_ids: ids, added tokens of the file counted.
    """

    tokenizer: Any
    name: str
    bos_id: int | None
    eos_id: int | None
    num_ids: int


def load(path: str | os.PathLike) -> Found:
    """The tokenizer of a file.

    A folder holds one of them; "smollm2" is a published file. Begin and end of a tokenizer.json
    are those of the tokenizer_config.json beside it, or tokens of a usual name.

    Raises:
      DataError: not a tokenizer.
      MissingExtraError: the package that reads it is missing.
    """
    if not path:
        raise records.DataError(
            "no tokenizer is named: set it (formatter.tokenizer in a recipe) to "
            "a SentencePiece tokenizer.model, a tokenizer.json or a .gguf file"
        )
    file = wheels.find(path)
    if file.is_dir():
        names = ("tokenizer.model", "tokenizer.json")
        found = [file / name for name in names if (file / name).exists()]
        if not found:
            raise records.DataError(f"{file} holds no tokenizer: neither {' nor '.join(names)}")
        file = found[0]
    if not file.exists():
        raise records.DataError(f"{file}: no such tokenizer")
    with tokenizers.named_errors(file):
        return _open(file)


def _open(file: pathlib.Path) -> Found:
    if file.suffix == ".model":
        model = tokenizers.from_sentencepiece(file)
        return Found(model, str(file), model.bos_id(), model.eos_id(), model.vocab_size())
    if file.suffix == ".gguf":
        from vlm_jax.weights import readers

        metadata = readers.read(file).metadata
        ids = {f"{k}_id": metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos")}
        made = tokenizers.from_gguf(metadata)
        return Found(made, str(file), num_ids=tokenizers.num_ids(made), **ids)
    tokenizer = tokenizers.from_json(file)
    named = tokenizers.special_tokens(file)
    ids = {}
    for kind, usual in (("bos", _BEGINS), ("eos", _ENDS)):
        found = map(tokenizer.token_to_id, (named.get(f"{kind}_token", ""), *usual))
        ids[f"{kind}_id"] = next((i for i in found if i is not None), None)
    return Found(tokenizer, str(file), num_ids=tokenizers.num_ids(tokenizer), **ids)


def written(
    tokenizer: Any, *, bos_id: int, eos_id: int
) -> tuple[str, dict[str, Callable[[pathlib.Path], None]]]:
    """A tokenizer's file name, and name -> function writing the file, of all that `load` needs.

    What was read from a GGUF file becomes a tokenizer.json.
    """
    if hasattr(tokenizer, "serialized_model_proto"):
        content = tokenizer.serialized_model_proto()
        return "tokenizer.model", {"tokenizer.model": lambda path: path.write_bytes(content)}
    named = {
        f"{kind}_token": tokenizer.id_to_token(number)
        for kind, number in (("bos", bos_id), ("eos", eos_id))
    }
    texts = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(named, indent=2) + "\n",
    }
    return "tokenizer.json", {
        name: functools.partial(pathlib.Path.write_text, data=text, encoding="utf-8")
        for name, text in texts.items()
    }
