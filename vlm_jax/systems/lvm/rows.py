"""Rows of visual sentences, shown: context, the image that follows, and what a model made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_jax import answer
from vlm_jax.data import images
from vlm_jax.systems.lvm import prompts

# Kind of a sentence, the last word of the name of its file -> what is given and what is asked.
CAPTIONS = {
    "video": "frames of a video: what comes next?",
    "pan": "a window moves over a photo: what comes next?",
    "colour": "grey, in colour, grey, ...: the last one in colour",
    "group": "photos of a class, then of another: one more of the class",
    "inpaint": "with holes, whole, ...: the last one whole",
    "mask": "scene, its mask, scene, ...: the mask of the last one",
    "box": "scene, box of the thing, ...: the box in the last one",
    "edges": "scene, its edges, ...: the edges of the last one",
    "photo": "grey, in colour, grey, ...: the last one in colour",
    "motion": "a thing moves over a ground: what comes next?",
}


@dataclasses.dataclass(frozen=True)
class RowReader:
    """What the rows of a run hold, for evaluations; see `format.py` for the rows.

    Attributes:
      context_images: in front of the image that is predicted.
      lead_tokens: ids before the first image of a row (BOS).
      size: ids of an image. codebook_size: ids below are visual.
      tokenizer: -> the `encoders.image_tokenizer.ImageTokenizer`.
    """

    context_images: int
    lead_tokens: int
    size: int
    codebook_size: int
    tokenizer: Callable[[], Any]

    needs = ("ids",)

    def collate(
        self, arrays: Mapping[str, np.ndarray], hosts: list[answer.Host], *, truth: bool
    ) -> tuple[Mapping[str, np.ndarray], list[answer.Host]]:
        """The same arrays; with `truth`, hosts that have the images of their rows."""
        if not truth:
            return arrays, hosts
        end = self.lead_tokens + self.context_images * self.size
        if (length := arrays["tokens"].shape[1]) + 1 < end + self.size:
            raise ValueError(
                f"rows of {length} tokens hold no {self.context_images} context images of "
                f"{self.size} ids and one more; lower task.context_images"
            )
        ids = np.concatenate(
            [
                arrays["tokens"][:, self.lead_tokens : end],
                arrays["targets"][:, end - 1 : end - 1 + self.size],  # target t is token t + 1
            ],
            axis=1,
        )
        ids = np.clip(ids, 0, self.codebook_size - 1)
        made = prompts.answers_of(ids, self.tokenizer(), self.size)
        context = self.context_images
        return arrays, [
            dataclasses.replace(
                host,
                truth=answer.Answer(images=row.images[context:]),
                images=tuple(map(images.to_u8, row.images[:context])),
                caption=_caption(host.id),
            )
            for host, row in zip(hosts, made, strict=True)
        ]

    def read(
        self, outputs: Mapping[str, np.ndarray], hosts: list[answer.Host]
    ) -> list[answer.Answer]:
        """The images of the ids that were made."""
        ids = np.clip(outputs["ids"], 0, self.codebook_size - 1)
        return prompts.answers_of(ids, self.tokenizer(), self.size)


def _caption(name: str) -> str:
    """'heldout_video.array_record:3' -> 'frames of a video: ... (3)', to label a row."""
    file, _, number = name.partition("+")[0].rpartition("/")[2].rpartition(":")
    kind = file.partition(".")[0].rpartition("_")[2]
    return f"{CAPTIONS.get(kind, kind)} ({number})" if name else ""
