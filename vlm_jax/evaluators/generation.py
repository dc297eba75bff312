"""Pictures for the prompts of a batch file, tiled and named as the reference's script does.

One picture per record: candidates below each other, new images from left to right, after the inputs
if wanted. It is written to `out_dir/<id of the record>`, which for `type="visual_prompts"` is the
"output" of the line. `python -m vlm_jax.predict lvm --jsonl=...` does the same without a recipe.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.data import images, records, tiling


@dataclasses.dataclass
class Evaluator:
    """See the module. The data are prompts: `evals.X.formatter`.

    Attributes:
      predict: a predictor whose outputs `task.decode_batch` understands.
      candidates: independent answers per prompt.
      resize_output: of every image: "" (as made), "original" (as the last input) or "W,H".
      show_inputs: put the inputs in front.
    """

    predict: str = "continue"
    candidates: int = 2  # upstream's default
    resize_output: str = ""
    show_inputs: bool = False

    needs = ()
    task_needs = ("decode_batch",)

    def __post_init__(self):
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates} must be at least 1")
        tiling.output_size(self.resize_output, (1, 1))

    def run(self, *, task, predict, batches, read, out_dir) -> dict[str, float]:
        """Writes the pictures; `pictures`, and where all targets are given, errors against them:

        mse      mean squared error of RGB in [0, 1], over candidates and images, then records
        mse_x3   three times that, which is what the reference's script prints
        """
        errors, written = [], 0
        for batch in batches:
            self.check_batch(batch)
            made = [task.decode_batch(predict(batch)) for _ in range(self.candidates)]
            made01 = np.stack(made, axis=1)
            pictures = batch["pictures"]
            for row in np.flatnonzero(batch["valid"]):
                if out_dir is not None:
                    inputs_u8 = pictures["prompt_u8"][row, : pictures["num_prompt"][row]]
                    path = tiling.place(out_dir, "+".join(batch["record_ids"][row]))
                    size = tiling.output_size(self.resize_output, batch["last_size"][row])
                    shown = list(inputs_u8) if self.show_inputs else []
                    tiling.save(path, tiling.draw(images.to_u8(made01[row]), shown, size))
                written += 1
                if pictures["num_target"][row] == made01.shape[2]:
                    true01 = images.to01(pictures["target_u8"][row])
                    errors.append(np.square(made01[row].astype(np.float64) - true01).mean())
        if not written:
            raise records.DataError("generation: the evaluation data hold no usable prompt")
        result = {"pictures": float(written)}
        if errors:
            result |= {"mse": float(np.mean(errors)), "mse_x3": 3 * float(np.mean(errors))}
        return result

    def check_batch(self, batch) -> None:
        """Raises DataError unless prompts are pictures and outputs stay in their folder."""
        if "pictures" not in batch:
            raise records.DataError("generation needs prompts of pictures; give evals.X.formatter")
        for names in batch["record_ids"]:
            if names:
                tiling.place(".", "+".join(names))
