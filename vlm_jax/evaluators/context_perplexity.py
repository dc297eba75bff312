"""Perplexity of an image by the number of images before it (figure 7 of the LVM paper).

The target is the last image of a row and stays; the context is the 1, 2, ... images before it. The
k + 1 images stand at the start of a row of fixed length, so that one shape is compiled; causality
hides what follows. Writes context_perplexity.jsonl and context_perplexity.png.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from vlm_jax.data import records
from vlm_jax.program import curves, passes


@dataclasses.dataclass
class Evaluator:
    """See the module. The data are rows of one sentence each (`packing="none"`), or prompts.

    Attributes:
      tokens_per_image: ids of an image.
      predict: a predictor that gives `logp` float32[B, T].
      max_context: most context images; rows with fewer images before their last are left out.
      lead_tokens: ids in front of the first image of a row (BOS).
      keep_lead: put them in front of every context too, as runs of our own are trained; the
        reference has no BOS here.
    """

    tokens_per_image: int
    predict: str = "score"
    max_context: int = 15
    lead_tokens: int = 0
    keep_lead: bool = False

    needs = ("logp",)

    def __post_init__(self):
        if self.max_context < 1 or self.tokens_per_image < 1:
            raise ValueError("max_context and tokens_per_image must be at least 1")

    def run(self, data: passes.Pass) -> dict[str, float]:
        """`context_K`: mean over rows of the perplexity after K images; `rows`, `left_out`.

        Raises:
          DataError: no row has enough images.
        """
        lines = []
        for batch in data.batches:
            lead_bl, images_bnt, used_b = self._images(batch)
            found = {int(row): [] for row in batch.rows[batch.valid]}
            # All processes predict together, also where none of this one's rows is long enough.
            for k in range(1, self.max_context + 1):
                made, scored = self._row(lead_bl, images_bnt[:, -(k + 1) :])
                changed = dataclasses.replace(batch, arrays=made)
                logp_bt = data.predict(changed)["logp"].astype(np.float64)[:, scored]
                for row in np.flatnonzero(used_b):
                    found[int(batch.rows[row])].append(float(np.exp(-logp_bt[row].mean())))
            lines += found.items()
        lines = data.gather(lines)
        used = [line for line in lines if line]
        rows, left_out = len(used), len(lines) - len(used)
        if not rows:
            raise records.DataError(
                f"context_perplexity: none of {left_out} rows holds {self.max_context + 1} images "
                f"of {self.tokens_per_image} ids; lower max_context"
            )
        means = {k: float(x) for k, x in enumerate(np.mean(used, axis=0), 1)}
        if data.first:
            path = data.folder / "context_perplexity.jsonl"
            lines = [json.dumps({"context": k, "perplexity": x}) + "\n" for k, x in means.items()]
            path.write_text("".join(lines))
            series = {"perplexity of the next image": list(means.items())}
            curves.draw_series(series, path.with_suffix(".png"), x_label="context images")
        named = {f"context_{k:02d}": x for k, x in means.items()}
        return {**named, "rows": float(rows), "left_out": float(left_out)}

    def _images(self, batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lead ids, ids of the last max_context + 1 images of a row, and which rows have them."""
        size, count = self.tokens_per_image, self.max_context + 1
        arrays = batch.arrays
        ids_bt = np.concatenate([arrays["tokens"][:, :1], arrays["targets"]], axis=1)
        length_b = (arrays["segments"] == 1).sum(axis=1) + 1
        number_b = (length_b - self.lead_tokens) // size
        used_b = batch.valid & (number_b >= count)
        images_bnt = np.zeros((len(ids_bt), count, size), np.int32)
        for row in np.flatnonzero(used_b):
            start = self.lead_tokens + (number_b[row] - count) * size
            images_bnt[row] = ids_bt[row, start : start + count * size].reshape(count, size)
        return ids_bt[:, : self.lead_tokens * self.keep_lead], images_bnt, used_b

    def _row(self, lead_bl, images_bnt) -> tuple[dict[str, np.ndarray], slice]:
        """A batch of lead, context and target, and where the target's ids are scored."""
        rows, size = len(images_bnt), self.tokens_per_image
        total = lead_bl.shape[1] + (self.max_context + 1) * size
        ids_bt = np.concatenate([lead_bl, images_bnt.reshape(rows, -1)], axis=1)
        used = ids_bt.shape[1]
        ids_bt = np.pad(ids_bt, [(0, 0), (0, total - used)]).astype(np.int32)
        places = np.tile(np.arange(total - 1, dtype=np.int32), (rows, 1))
        scored = slice(used - 1 - size, used - 1)
        weights_bt = np.zeros((rows, total - 1), np.float32)
        weights_bt[:, scored] = 1
        row = {
            "tokens": ids_bt[:, :-1],
            "targets": ids_bt[:, 1:],
            "weights": weights_bt,
            "segments": (places < used - 1).astype(np.int32),
            "positions": places,
        }
        return row, scored
