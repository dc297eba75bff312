"""The ids of NXTP's texts, all of them from the tokenizer.

    <image> BOS  prompt ...  label ,  label ,  ...  EOS            released form
    <image> BOS  prompt ...  label ,  label ,  ...  label ,        closed form

Two ids are added behind the tokenizer's: <image>, the marker behind the image's vectors, and
<empty> at padding places. A SentencePiece tokenizer, as a .model or as a tokenizer.json, encodes
the whole text at once, as the reference does. Byte-level ones may join a comma with what stands
beside it, so there every label is encoded with a space in front, and the delimiter put between.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from vlm_jax.data import records, tokenizers
from vlm_jax.encoders import tokenizer_files

DELIMITER = ","
# Templates that training draws from; inference takes the first. upstream: src/dataset.py
PROMPTS = (
    "The objects in the image are",
    "The items present in the picture are",
    "The elements depicted in the image are",
    "The objects shown in the photograph are",
    "The items visible in the image are",
    "The objects that appear in the picture are",
    "The elements featured in the image are",
    "The items captured in the photograph are",
    "The elements seen in the picture are",
    "The items represented in the image are",
)


class Vocabulary:
    """A tokenizer with NXTP's special ids.

    Attributes:
      size: ids, the added ones counted.
      image_id, empty_id: the added ones.
      bos_id, eos_id, delimiter_id: of the tokenizer.
    """

    def __init__(self, tokenizer: Any, *, name: str = "tokenizer", bos_id=None, eos_id=None):
        """Takes a `SentencePieceProcessor` or a `tokenizers.Tokenizer`.

        Raises:
          DataError: no begin or end token, or the delimiter is not a token of its own.
        """
        self._tokenizer = tokenizer
        self._library = hasattr(tokenizer, "bos_id")  # sentencepiece, or tokenizers
        self._whole = self._library or tokenizers.marks_spaces(tokenizer)
        if self._library:
            base, bos_id, eos_id = tokenizer.vocab_size(), tokenizer.bos_id(), tokenizer.eos_id()
            self._unknown = tokenizer.unk_id()
        else:
            base = tokenizers.num_ids(tokenizer)
            self._unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
            tokenizer.encode_special_tokens = True  # "</s>" in a label is text
        if bos_id is None or eos_id is None or min(bos_id, eos_id) < 0:
            raise records.DataError(
                f"{name}: begin token {bos_id}, end token {eos_id}; NXTP needs both"
            )
        self.bos_id, self.eos_id = int(bos_id), int(eos_id)
        self.image_id, self.empty_id, self.size = base, base + 1, base + 2
        self.delimiter_id = self._delimiter(name)

    def _delimiter(self, name: str) -> int:
        ids = self.encode(f"a{DELIMITER} b") if self._whole else self.encode(DELIMITER)
        found = [i for i in ids if self.decode([i]).strip() == DELIMITER]
        if len(found) != 1 or (not self._whole and len(ids) != 1):
            raise records.DataError(
                f"{name}: writes {DELIMITER!r} as {ids}: the delimiter between labels must be one "
                "token of its own; take another tokenizer"
            )
        return found[0]

    def encode(self, text: str) -> list[int]:
        """Ids without begin and end."""
        if self._library:
            return list(self._tokenizer.encode(text))
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text; the added ids say nothing."""
        ids = [int(i) for i in ids if 0 <= int(i) < self.image_id]
        return self._tokenizer.decode(ids)

    def file(self) -> tuple[str, dict[str, Callable[[pathlib.Path], None]]]:
        """Its file's name, and name -> function writing the file; see `tokenizer_files.written`."""
        return tokenizer_files.written(self._tokenizer, bos_id=self.bos_id, eos_id=self.eos_id)

    @functools.cache  # noqa: B019 - one vocabulary per process, a dozen prompts
    def prompt(self, text: str = PROMPTS[0]) -> tuple[int, ...]:
        """<image>, BOS and the prompt."""
        return (self.image_id, self.bos_id, *self.encode(text))

    def text(self, prompt: str, labels: Sequence[str], *, closed: bool) -> list[int]:
        """The whole row; see the module.

        Raises:
          BadRecordError: the tokenizer has no token for a part of a label, or the labels change
            how the prompt is written.
        """
        front = list(self.prompt(prompt))
        if self._whole:
            joined = f"{prompt} " + f"{DELIMITER} ".join(labels)
            ids = [*front[:2], *self.encode(joined)]
        else:
            spaced = [self.encode(f" {label}") for label in labels]
            ids = list(front)
            for i, label in enumerate(spaced):
                ids += ([self.delimiter_id] if i else []) + label
        if ids[: len(front)] != front:
            raise records.BadRecordError(
                f"behind {prompt!r} the labels {labels} begin inside the prompt's last token"
            )
        if self._unknown is not None and self._unknown in ids[len(front) :]:
            raise records.BadRecordError(f"the tokenizer has no tokens for all of {labels}")
        if not closed:
            return [*ids, self.eos_id]
        return [*ids, self.delimiter_id] if labels else ids


@functools.lru_cache(maxsize=4)
def load(path: str | os.PathLike) -> Vocabulary:
    """The vocabulary of a file, see `tokenizer_files.load`.

    Raises:
      DataError: not a tokenizer, or one that does not do; see `Vocabulary`.
      MissingExtraError: the package that reads it is missing.
    """
    found = tokenizer_files.load(path)
    ids = dict(bos_id=found.bos_id, eos_id=found.eos_id)
    with tokenizers.named_errors(found.name):  # tokens that are no text, say
        return Vocabulary(found.tokenizer, name=found.name, **ids)
