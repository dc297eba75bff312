"""Few-shot prompts: k pairs and a query, and how near the generated answer is to the true one.

    kind           score per image
    segmentation   iou of the foreground
    detection      iou of the foreground, and box_iou of the smallest boxes around it
    colorization   mse of RGB in [0, 1] (mse_x3 is what the reference's batch script prints), lpips

Foreground: colours nearer to `foreground` than to `background` by `threshold`, that is

    dot(x - background, foreground - background) / |foreground - background|^2 > threshold

With white on black this is the mean of the channels. The paper does not say what rule it used.

Every score is printed beside the scores of what costs nothing, and of a perfect answer:

    copy_input       the query itself (of colorization: the grey picture)
    all_foreground   everything is foreground
    mean_mask        the mean of the example masks, thresholded
    tokenizer        the true answer, encoded and decoded: what the tokenizer leaves possible

Means are over images: `iou`, per fold `fold_0_iou`, and `miou`, the mean over classes.
`few_shot.png` shows pairs, query, generated and true answer; `images.jsonl` has a line per image.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data import images, records
from vlm_jax.metrics import masks, perceptual
from vlm_jax.program import passes
from vlm_jax.weights import lpips as lpips_weights

CAPTIONS = {  # kind -> what is asked, for the picture
    "segmentation": "mark the thing as in the examples",
    "detection": "box the thing as in the examples",
    "colorization": "colour it as in the examples",
}
KINDS = tuple(CAPTIONS)


@dataclasses.dataclass
class Evaluator:
    """See the module. The data are prompts: `evals.X.formatter`.

    Attributes:
      kind: see the module.
      predict: a predictor whose outputs the formatter reads as images.
      threshold: see the module.
      foreground, background: colours of the answers, 0...1.
      lpips: also score it, with the published VGG16 (fetched once); for colorization.
      rows, cell: of the picture: number of prompts, side of an image in pixels.
    """

    kind: str
    predict: str = "continue"
    threshold: float = 0.5
    foreground: tuple = (1.0, 1.0, 1.0)
    background: tuple = (0.0, 0.0, 0.0)
    lpips: bool = False
    rows: int = 8
    cell: int = 96

    compares = True
    baselines = {
        f"{name}_{key}": key
        for name in ("copy_input", "all_foreground", "mean_mask", "tokenizer")
        for key in ("iou", "box_iou", "mse", "mse_x3", "lpips")
    }

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if tuple(self.foreground) == tuple(self.background):
            raise ValueError("foreground and background are the same colour")

    def run(self, data: passes.Pass) -> dict[str, float]:
        """Scores over one pass; see the module.

        Raises:
          DataError: no prompt, or prompts that `check` refuses.
        """
        lines, shown, names = [], [], None
        for batch in data.batches:
            self.check(batch)
            made = data.answers(batch)
            known = data.read({"ids": batch.arrays["target_ids"]}, batch)
            places = batch.scored()
            if not places:
                continue
            prompt_u8 = np.stack([batch.hosts[i].images for i in places])
            made01, known01 = (np.stack([x[i].images[0] for i in places]) for x in (made, known))
            true01 = np.stack([batch.hosts[i].truth.images[0] for i in places])
            scores = self.score(made01, images.to01(prompt_u8), true01, known01)
            names = list(scores)
            for row, at in enumerate(places):
                host = batch.hosts[at]
                values = {key: float(x[row]) for key, x in scores.items()}
                lines.append((int(batch.rows[at]), {"id": host.id, **host.tags, **values}))
                if len(shown) < self.rows:
                    answers_u8 = images.to_u8(made01[row]), images.to_u8(true01[row])
                    shown.append((host.id, [*prompt_u8[row], *answers_u8]))
        lines = data.gather(lines)
        if not lines:
            raise records.DataError("few_shot: the evaluation data hold no usable prompt")
        if data.first:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (data.folder / "images.jsonl").write_text(text)
            if shown:
                (data.folder / "few_shot.png").write_bytes(images.encode(self._draw(shown)))
        return summary(lines, names)

    def prepare(self) -> None:
        """Loads what LPIPS needs."""
        if self.lpips and self.kind == "colorization":
            _lpips()

    def check(self, batch: passes.Batch) -> None:
        """Raises DataError unless prompts are k pairs and a query, with its answer."""
        if "target_ids" not in batch.arrays:
            raise records.DataError(
                "few_shot needs prompts of pictures; give evals.X.formatter=dict(images=...)"
            )
        room = batch.arrays["prompt_images"].shape[1]
        for place in batch.scored():
            host = batch.hosts[place]
            if not host.images:
                raise records.DataError("few_shot needs prompts of pictures, not of ids")
            if len(host.images) != room or room % 2 == 0:
                raise records.DataError(
                    f"few_shot needs k pairs and a query in every prompt; evals.X.formatter.images="
                    f"{room} must be 2 * shots + 1 of the data"
                )
            if not host.truth.images:
                raise records.DataError("few_shot: a prompt has no true answer ('target')")

    def score(
        self, made01: np.ndarray, prompt01: np.ndarray, true01: np.ndarray, known01: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Scores per image, float64[B].

        Args:
          made01, true01, known01: float[B, S, S, 3], generated, true, and true through the
            tokenizer.
          prompt01: float[B, 2k + 1, S, S, 3].
        """
        answers = {"": made01, "copy_input_": prompt01[:, -1], "tokenizer_": known01}
        if self.kind == "colorization":
            return self._colour_scores(answers, true01)
        answers["all_foreground_"] = np.ones_like(true01) * np.array(self.foreground)
        answers["mean_mask_"] = prompt01[:, 1::2].mean(axis=1)
        true = self._is_foreground(true01)
        result = {}
        for name, answer01 in answers.items():
            mask = self._is_foreground(answer01)
            result[f"{name}iou"] = masks.iou(mask, true)
            if self.kind == "detection":
                boxes = masks.boxes_of(mask), masks.boxes_of(true)
                result[f"{name}box_iou"] = masks.box_iou(*boxes)
        return result

    def _colour_scores(self, answers, true01):
        result = {}
        for name, answer01 in answers.items():
            error = np.square(answer01.astype(np.float64) - true01).mean(axis=(1, 2, 3))
            result[f"{name}mse"], result[f"{name}mse_x3"] = error, 3 * error
            if self.lpips:
                result[f"{name}lpips"] = _lpips()(answer01, true01)
        return result

    def _is_foreground(self, image01: np.ndarray) -> np.ndarray:
        back = np.array(self.background, np.float64)
        axis = np.array(self.foreground, np.float64) - back
        return (image01 - back) @ axis / (axis @ axis) > self.threshold

    def _draw(self, shown):
        shots = len(shown[0][1]) // 2 - 1
        columns = [f"{what} {i + 1}" for i in range(shots) for what in ("example", "answer")]
        return images.draw_grid(
            [pictures for _, pictures in shown],
            column_labels=[*columns, "query", "generated", "true"],
            row_labels=[
                f"{CAPTIONS[self.kind]} ({name.rpartition('/')[2][:24]})" for name, _ in shown
            ],
            cell=self.cell,
        )


def summary(lines: list[dict[str, Any]], names: Sequence[str] | None = None) -> dict[str, float]:
    """Means of per-image lines over images, folds and classes.

    Args:
      lines: of `images.jsonl`.
      names: of the scores; None takes all keys but id, label and fold.
    """
    keys = names or [key for key in lines[0] if key not in ("id", "label", "fold")]

    def mean(of, key):
        return float(np.mean([line[key] for line in of]))

    result = {key: mean(lines, key) for key in keys} | {"images": float(len(lines))}
    if "iou" in keys:
        classes = sorted({line.get("label", -1) for line in lines} - {-1})
        of_class = [[line for line in lines if line.get("label") == label] for label in classes]
        if classes:
            result["miou"] = float(np.mean([mean(of, "iou") for of in of_class]))
            result["classes"] = float(len(classes))
        for fold in sorted({line.get("fold", -1) for line in lines} - {-1}):
            of_fold = [line for line in lines if line.get("fold") == fold]
            result[f"fold_{fold}_iou"] = mean(of_fold, "iou")
    return result


@functools.cache
def _lpips() -> perceptual.Lpips:
    return perceptual.Lpips(lpips_weights.load())
