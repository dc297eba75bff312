"""A picture of what the model makes: labelled rows of images, written as `samples.png`."""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.data import images
from vlm_jax.program import passes


@dataclasses.dataclass
class Evaluator:
    """Rows of what was given, what was generated and what is true, drawn in a grid.

    Attributes:
      predict: a predictor whose outputs the formatter reads as images.
      rows: rows of the picture; evenly spaced over the batches that are read.
      cell: side of an image in the picture, in pixels.
    """

    predict: str = "continue"
    rows: int = 8
    cell: int = 96

    compares = True

    def run(self, data: passes.Pass) -> dict[str, float]:
        """Writes the picture; returns the means of the outputs that are one number a row."""
        pictures, lines = [], []
        for batch in data.batches:
            outputs = data.predict(batch)
            answers = data.read(outputs, batch)
            scalars = {key: x for key, x in outputs.items() if np.ndim(x) == 1}
            for at in batch.scored():
                host = batch.hosts[at]
                made, true = answers[at].images, host.truth.images
                pictures.append(
                    (
                        host.caption or host.id,
                        list(host.images),
                        *([*map(images.to_u8, x)] for x in (made, true)),
                    )
                )
                values = {key: float(x[at]) for key, x in scalars.items()}
                lines.append((int(batch.rows[at]), values))
        if data.first and pictures:
            chosen = np.linspace(0, len(pictures) - 1, min(self.rows, len(pictures))).round()
            sheet = self._draw([pictures[int(index)] for index in chosen])
            (data.folder / "samples.png").write_bytes(images.encode(sheet))
        lines = data.gather(lines)
        keys = lines[0] if lines else {}
        return {key: float(np.mean([values[key] for values in lines])) for key in keys}

    def _draw(self, rows) -> np.ndarray:
        given, made, true = (max(len(row[i]) for row in rows) for i in (1, 2, 3))
        columns = [f"context {i + 1}" for i in range(given)]
        for name, count in (("generated", made), ("true", true)):
            columns += [name] if count == 1 else [f"{name} {i + 1}" for i in range(count)]
        side = rows[0][2][0].shape[:2]
        blank = np.full((*side, 3), 255, np.uint8)

        def filled(row):
            # A prompt that is shorter begins further right, next to what it led to.
            parts = zip(row[1:], (given, made, true), (True, False, False), strict=True)
            for part, count, right in parts:
                gap = [blank] * (count - len(part))
                yield from [*gap, *part] if right else [*part, *gap]

        return images.draw_grid(
            [list(filled(row)) for row in rows],
            column_labels=columns,
            row_labels=[row[0] for row in rows],
            cell=self.cell,
        )
