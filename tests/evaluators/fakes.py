"""Stand-ins for a task and its predictors, with outputs that tests know."""

import numpy as np

NAMES = ("tokens", "targets", "weights", "segments", "positions")


class Task:
    """Ids of one image are indices into `answers01`; `decode_batch` looks them up."""

    def __init__(self, answers01):
        self._answers01 = np.asarray(answers01, np.float32)

    def decode_batch(self, outputs):
        return self._answers01[np.asarray(outputs["ids"])]


def gray(*rows):
    """uint8[H, W, 3] from rows of numbers."""
    return np.repeat(np.array(rows, np.uint8)[..., None], 3, axis=-1)


def prompt_batch(prompts, targets, *, valid=None, labels=None, folds=None, names=None):
    """What `systems.lvm.prompts.encode` makes of pictures, without the rows of ids.

    The ids of target i are [[i]].
    """
    count = len(prompts)
    return {
        "pictures": {
            "prompt_u8": np.array(prompts, np.uint8),
            "target_u8": np.array(targets, np.uint8)[:, None],
            "num_prompt": np.full(count, len(prompts[0]), np.int32),
            "num_target": np.ones(count, np.int32),
        },
        "target_ids": np.arange(count)[:, None],
        "label": np.full(count, -1) if labels is None else np.array(labels),
        "fold": np.full(count, -1) if folds is None else np.array(folds),
        "last_size": np.tile([4, 6], (count, 1)),
        "valid": np.ones(count, bool) if valid is None else np.array(valid),
        "record_ids": [[name] for name in names or [f"r{i}" for i in range(count)]],
    }


def run(evaluator, batches, *, task=None, predict=None, out_dir=None):
    return evaluator.run(
        task=task, predict=predict, batches=iter(batches), read=None, out_dir=out_dir
    )
