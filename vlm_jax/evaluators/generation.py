"""Pictures for the prompts of a batch file, tiled and named as the reference's script does.

One picture per record: candidates below each other, new images from left to right, after the inputs
if wanted. It is written where the record's "output" says (of `type="visual_prompts"`, that of the
line), below the folder of the evaluation; without one, `NUMBER.png`.
`python -m vlm_jax.predict lvm --jsonl=...` does the same without a recipe.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.data import images, records, tiling
from vlm_jax.program import passes


@dataclasses.dataclass
class Evaluator:
    """See the module. The data are prompts: `evals.X.formatter`.

    Attributes:
      predict: a predictor whose outputs the formatter reads as images.
      candidates: independent answers per prompt.
      resize_output: of every image: "" (as made), "original" (as the last input) or "W,H".
      show_inputs: put the inputs in front.
    """

    predict: str = "continue"
    candidates: int = 2  # upstream's default
    resize_output: str = ""
    show_inputs: bool = False

    compares = True

    def __post_init__(self):
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates} must be at least 1")
        tiling.output_size(self.resize_output, (1, 1))

    def run(self, data: passes.Pass) -> dict[str, float]:
        """Writes the pictures; `pictures`, and where all targets are given, errors against them:

        mse      mean squared error of RGB in [0, 1], over candidates and images, then records
        mse_x3   three times that, which is what the reference's script prints
        """
        lines = []
        for batch in data.batches:
            self.check(batch)
            made = [data.answers(batch) for _ in range(self.candidates)]
            for at in batch.scored():
                host, row = batch.hosts[at], int(batch.rows[at])
                made01 = np.stack([np.stack(answers[at].images) for answers in made])
                path = tiling.place(data.folder, host.output or f"{row:06d}.png")
                size = tiling.output_size(self.resize_output, host.size)
                shown = list(host.images) if self.show_inputs else []
                tiling.save(path, tiling.draw(images.to_u8(made01), shown, size))
                error = None
                if len(host.truth.images) == made01.shape[1]:
                    true01 = np.stack(host.truth.images)
                    error = float(np.square(made01.astype(np.float64) - true01).mean())
                lines.append((row, error))
        lines = data.gather(lines)
        if not lines:
            raise records.DataError("generation: the evaluation data hold no usable prompt")
        errors = [error for error in lines if error is not None]
        result = {"pictures": float(len(lines))}
        if errors:
            result |= {"mse": float(np.mean(errors)), "mse_x3": 3 * float(np.mean(errors))}
        return result

    def check(self, batch: passes.Batch) -> None:
        """Raises DataError unless prompts are pictures and outputs stay in their folder."""
        for at in batch.scored():
            if "target_ids" not in batch.arrays or not batch.hosts[at].images:
                raise records.DataError(
                    "generation needs prompts of pictures; give evals.X.formatter"
                )
            if batch.hosts[at].output:
                tiling.place(".", batch.hosts[at].output)
