"""A pass of an evaluation whose data and outputs tests know."""

import pathlib
import tempfile

import numpy as np

from vlm_jax import answer
from vlm_jax.data import images
from vlm_jax.program import passes

NAMES = ("tokens", "targets", "weights", "segments", "positions")


class Reader:
    """Ids of one image are indices into `answers01`."""

    def __init__(self, answers01):
        self._answers01 = np.asarray(answers01, np.float32)

    def read(self, outputs, batch):
        return [answer.Answer(images=tuple(row)) for row in self._answers01[outputs["ids"]]]


def gray(*rows):
    """uint8[H, W, 3] from rows of numbers."""
    return np.repeat(np.array(rows, np.uint8)[..., None], 3, axis=-1)


def batch_of(arrays, hosts=None, *, valid=None, first=0):
    """Rows `first`, `first + 1`, ... of a pass."""
    count = len(next(iter(arrays.values())))
    return passes.Batch(
        arrays=arrays,
        hosts=hosts or [answer.Host(id=f"r{i}") for i in range(count)],
        valid=np.ones(count, bool) if valid is None else np.array(valid),
        rows=first + np.arange(count),
    )


def prompt_batch(prompts, targets, *, valid=None, labels=None, folds=None, names=None):
    """What `systems.lvm.prompts` makes of pictures, without the rows of ids.

    The ids of target i are [[i]].
    """
    count = len(prompts)
    hosts = [
        answer.Host(
            truth=answer.Answer(images=tuple(images.to01(x) for x in targets[i : i + 1])),
            id=names[i] if names else f"r{i}",
            size=(4, 6),
            images=tuple(prompts[i]),
            output=names[i] if names else "",
            tags={"label": labels[i] if labels else -1, "fold": folds[i] if folds else -1},
        )
        for i in range(count)
    ]
    arrays = {
        "target_ids": np.arange(count)[:, None],
        "prompt_images": np.ones((count, len(prompts[0])), bool),
    }
    return batch_of(arrays, hosts, valid=valid)


def run(evaluator, batches, *, reader=None, predict=None, out_dir=None, other=()):
    return evaluator.run(
        passes.Pass(
            batches=iter(batches),
            predict=predict,
            read=reader.read if reader else None,
            other=lambda fields: iter(other),
            folder=pathlib.Path(out_dir or tempfile.mkdtemp()),
        )
    )
