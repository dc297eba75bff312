"""A picture of what the model makes: labelled rows of images, written as `samples.png`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vlm_jax.data import images, records
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
        shown, lines = _Spread(self.rows), []
        for batch in data.batches:
            outputs = data.predict(batch)
            answers = data.read(outputs, batch)
            scalars = {key: x for key, x in outputs.items() if np.ndim(x) == 1}
            for at in batch.scored():
                host, made = batch.hosts[at], answers[at].images
                if not made:
                    raise records.DataError(
                        f"image_grid shows images, and the answer about {host.id or 'a row'} has "
                        f"none; predict={self.predict!r} must be a predictor that makes some"
                    )
                both = ([*map(images.to_u8, x)] for x in (made, host.truth.images))
                shown.add((host.caption or host.id, list(host.images), *both))
                values = {key: float(x[at]) for key, x in scalars.items()}
                lines.append((int(batch.rows[at]), values))
        if data.first and (rows := shown.chosen()):
            (data.folder / "samples.png").write_bytes(images.encode(self._draw(rows)))
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


class _Spread:
    """Some of a stream, evenly spread over it; holds at most twice as many as are wanted."""

    def __init__(self, wanted: int):
        self._wanted, self._every, self._seen = max(1, wanted), 1, 0
        self._kept: list[Any] = []

    def add(self, item: Any) -> None:
        """The next of the stream."""
        if self._seen % self._every == 0:
            self._kept.append(item)
        self._seen += 1
        if len(self._kept) > 2 * self._wanted:
            self._kept, self._every = self._kept[::2], 2 * self._every

    def chosen(self) -> list[Any]:
        """As many as wanted, or all that there were; the first and nearly the last among them."""
        count = min(self._wanted, len(self._kept))
        places = np.linspace(0, len(self._kept) - 1, count).round()
        return [self._kept[int(place)] for place in places]
