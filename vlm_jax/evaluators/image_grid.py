"""A picture of what the model makes: labelled rows of images, written as `samples.png`."""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.data import images


@dataclasses.dataclass
class Evaluator:
    """Predicts, lets the task turn its output into labelled images, draws them in a grid.

    Attributes:
      predict: a predictor whose outputs `task.pictures(outputs)` understands.
      rows: sentences in the picture; evenly spaced over the batches that are read.
      cell: side of an image in the picture, in pixels.
    """

    predict: str = "continue"
    rows: int = 8
    cell: int = 96

    needs = ()

    def run(self, *, task, predict, batches, read, out_dir) -> dict[str, float]:
        """Writes the picture; returns the task's scalars about the images, averaged."""
        pictures, scalars = [], []
        for batch in batches:
            made = task.pictures(predict(batch), batch)
            for picture, numbers, valid in zip(*made, batch["valid"]):
                if valid:
                    pictures.append(picture)
                    scalars.append(numbers)
        chosen = np.linspace(0, len(pictures) - 1, min(self.rows, len(pictures))).round()
        if out_dir is not None:
            rows = [pictures[int(index)] for index in chosen]
            sheet = images.draw_grid(
                [row["images"] for row in rows],
                column_labels=rows[0]["columns"] if rows else (),
                row_labels=[row["label"] for row in rows],
                cell=self.cell,
            )
            (out_dir / "samples.png").write_bytes(images.encode(sheet))
        keys = scalars[0] if scalars else {}
        return {key: float(np.mean([numbers[key] for numbers in scalars])) for key in keys}
