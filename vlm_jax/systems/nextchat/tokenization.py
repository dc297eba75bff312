"""The ids of NExT-Chat's texts.

Five tokens are added behind a tokenizer's ids: places of the image, its two ends, `<at>` and
`<boxes>` (`network.ADDED_TOKENS`). The released model was trained on what one version of a library
made of texts with them, and that is repeated here for SentencePiece tokenizers:

    text        The dog<at> <boxes> holds it
    segments    "The dog", <at>, <boxes>, "holds it"      white space beside added tokens is gone
    pieces      The dog, <at>, <boxes>, ?, s it           the first piece behind an added token
                                                          loses its mark of a space, and where
                                                          nothing is called so, it is unknown

So words may become `<unk>` (0) behind an image or a location. Byte-level tokenizers (SmolLM2) have
no such rule: there every segment is encoded as it stands.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from vlm_jax.data import records
from vlm_jax.encoders import tokenizer_files
from vlm_jax.systems.nextchat import network

_SPACE = "\u2581"  # SentencePiece's mark of a space


class Tokenizer:
    """A tokenizer with the added tokens.

    Attributes:
      size: ids, the added ones counted.
      bos_id, eos_id: begin and end of a text.
      at_id, boxes_id, patch_id: of the added tokens.
    """

    def __init__(self, tokenizer: Any, *, bos_id: int, eos_id: int, num_base: int):
        self._tokenizer, self.bos_id, self.eos_id = tokenizer, bos_id, eos_id
        self._sentencepiece = hasattr(tokenizer, "id_to_piece")
        self.added = {token: num_base + i for i, token in enumerate(network.ADDED_TOKENS)}
        self.size = num_base + network.NUM_ADDED
        self.patch_id, self.at_id, self.boxes_id = (
            self.added[token] for token in ("<im_patch>", "<at>", "<boxes>")
        )
        special = {"<s>": bos_id, "</s>": eos_id}
        if self._sentencepiece:
            special["<unk>"] = tokenizer.unk_id()
        self._tokens = {**special, **self.added}
        self._hidden = set(special.values())  # not shown to people
        self._split = re.compile("|".join(map(re.escape, self._tokens)))

    def encode(self, text: str) -> list[int]:
        """BOS and the text; see the module."""
        if self._sentencepiece:
            text = text.replace(_SPACE, " ")
        ids, segments = [self.bos_id], self._segments(text)
        for number, segment in enumerate(segments):
            if segment in self._tokens and number % 2:
                ids.append(self._tokens[segment])
                continue
            # White space beside an added token is gone; `<s>`, `</s>` and `<unk>` take none.
            if number and segments[number - 1] in self.added:
                segment = segment.lstrip()
            if number + 1 < len(segments) and segments[number + 1] in self.added:
                segment = segment.rstrip()
            ids += self._encode(segment, first=number == 0)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without begin, end and unknown; added tokens stand between single spaces."""
        names = {number: token for token, number in self.added.items()}
        parts: list[str] = []
        run: list[int] = []
        for number in map(int, ids):
            if number in names:
                parts += [self._decode(run)] * bool(run) + [names[number]]
                run = []
            elif number not in self._hidden:
                run.append(number)
        parts += [self._decode(run)] * bool(run)
        return " ".join(parts)

    def _segments(self, text: str) -> list[str]:
        """Text, token, text, token, ..., text."""
        segments, end = [], 0
        for found in self._split.finditer(text):
            segments += [text[end : found.start()], found.group()]
            end = found.end()
        return [*segments, text[end:]]

    def _encode(self, segment: str, first: bool) -> list[int]:
        if not segment:
            return []
        if not self._sentencepiece:
            return list(self._tokenizer.encode(segment, add_special_tokens=False).ids)
        model = self._tokenizer
        ids = list(model.encode(segment))
        if first or segment.startswith(" ") or not ids:
            return ids
        piece = model.id_to_piece(ids[0])
        if not piece.startswith(_SPACE):
            return ids
        bare = piece.removeprefix(_SPACE)
        if not bare:
            return ids[1:]
        return [model.piece_to_id(bare), *ids[1:]]  # unknown where there is none

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def file(self) -> tuple[str, dict[str, Callable[[pathlib.Path], None]]]:
        """Its file's name, and name -> function writing the file; see `tokenizer_files.written`."""
        return tokenizer_files.written(self._tokenizer, bos_id=self.bos_id, eos_id=self.eos_id)


@functools.lru_cache(maxsize=4)
def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a file, see `tokenizer_files.load`; "smollm2" is a published one.

    Raises:
      DataError: not a tokenizer, or one without begin and end.
      MissingExtraError: the package that reads it is missing.
    """
    found = tokenizer_files.load(path)
    if found.bos_id is None or found.eos_id is None or min(found.bos_id, found.eos_id) < 0:
        raise records.DataError(
            f"{found.name}: begin token {found.bos_id}, end token {found.eos_id}; both are needed"
        )
    ids = dict(bos_id=int(found.bos_id), eos_id=int(found.eos_id))
    return Tokenizer(found.tokenizer, num_base=found.num_ids, **ids)
