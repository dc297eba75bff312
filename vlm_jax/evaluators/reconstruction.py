"""What survives a tokenizer: PSNR, use of the codebook, and a picture to look at."""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.data import images
from vlm_jax.metrics import image_quality


@dataclasses.dataclass
class Evaluator:
    """Scores `predict` over one pass and draws originals above reconstructions.

    Attributes:
      predict: a predictor that gives image01, recon01 (float32[B, S, S, 3]) and ids (int32[B, T]).
      codes: size of the codebook; codes that never occur count as unused.
      columns, rows: of the picture; one row is a row of originals and one of reconstructions.
      cell: side of an image in the picture, in pixels.
    """

    predict: str = "reconstruct"
    codes: int = 8192
    columns: int = 8
    rows: int = 3
    cell: int = 96

    needs = ("image01", "recon01", "ids")

    def run(self, *, task, predict, batches, read, out_dir) -> dict[str, float]:
        """Writes `reconstructions.png`; returns scalars:

        psnr             mean over images, dB
        code_usage       share of the codes that occur
        code_perplexity  exp of the entropy of the code frequencies; at most `codes`

        Raises:
          ValueError: no readable image.
        """
        scores, shown = [], []
        counts_e = np.zeros(self.codes, np.int64)
        for batch in batches:
            outputs, valid = predict(batch), batch["valid"]
            image01, recon01 = outputs["image01"][valid], outputs["recon01"][valid]
            scores.append(image_quality.psnr(image01, recon01))
            counts_e += np.bincount(outputs["ids"][valid].ravel(), minlength=self.codes)
            for pair in zip(image01, recon01):
                if len(shown) < self.columns * self.rows:
                    shown.append([images.to_u8(x) for x in pair])
        if not sum(map(len, scores)):
            raise ValueError("reconstruction: the evaluation data hold no readable image")
        if out_dir is not None:
            (out_dir / "reconstructions.png").write_bytes(images.encode(self._draw(shown)))
        p_e = counts_e[counts_e > 0] / counts_e.sum()
        return {
            "psnr": float(np.concatenate(scores).mean()),
            "code_usage": float((counts_e > 0).mean()),
            "code_perplexity": float(np.exp(-np.sum(p_e * np.log(p_e)))),
            "images": float(sum(map(len, scores))),
        }

    def _draw(self, shown):
        rows, labels = [], []
        for start in range(0, len(shown), self.columns):
            pairs = shown[start : start + self.columns]
            rows += [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
            labels += ["photo", "decoded"]
        return images.draw_grid(rows, row_labels=labels, cell=self.cell)
