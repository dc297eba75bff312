"""Where an expression is in an image: boxes and masks against the true ones, one for an image.

    acc_50, acc_75, acc_90   share of boxes whose IoU is above .5, .75, .9
    box_iou                  mean IoU of boxes; nothing said is 0
    ciou                     intersections of all masks / unions of all masks
    giou                     mean IoU of masks; 1 where nothing is there and nothing was said
    nothing_said             share of the images with a target for which no place was given
    several_said             share with a target for which more than one was
    false_alarm              share of the images without a target for which a place was given
    unreadable               share of the answers that could not be read

With ends of a 95 % interval beside acc_50, ciou and giou (`acc_50_low`, `acc_50_high`), from
samples of the images with replacement. Beside the boxes stands what needs no image:

    centre_acc_50            a box of half the sides in the middle
    mean_acc_50              the mean of the true boxes, as shares of the sides

The published evaluation of masks counts an answer of several places as an empty mask; `several`
says so. `locations.jsonl` has a line per image, with what was said; `locations.png` shows true
places in green and said ones in red.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlm_jax import answer
from vlm_jax.data import annotations, images, records
from vlm_jax.metrics import intervals, masks
from vlm_jax.program import passes

THRESHOLDS = (50, 75, 90)
_GREEN, _RED = (0, 170, 0), (220, 0, 0)


@dataclasses.dataclass
class Evaluator:
    """See the module.

    Attributes:
      predict: a predictor whose outputs the formatter reads as boxes, and masks.
      several: of several places said, "first" counts, or "none", as published for masks.
      rows, columns, cell: of the picture: images, and their side in pixels.
    """

    predict: str
    several: str = "first"
    rows: int = 3
    columns: int = 4
    cell: int = 224

    compares = True
    baselines = {"centre_acc_50": "acc_50", "mean_acc_50": "acc_50"}

    def __post_init__(self):
        if self.several not in ("first", "none"):
            raise ValueError(f"several={self.several!r} is neither 'first' nor 'none'")

    def run(self, data: passes.Pass) -> dict[str, float]:
        """Scores over one pass; see the module.

        Raises:
          DataError: no image could be read, or one with several true places.
        """
        lines: list[tuple[int, dict[str, Any]]] = []
        shown: list[np.ndarray] = []
        for batch in data.batches:
            said = data.answers(batch)
            for place in batch.scored():
                host, one = batch.hosts[place], said[place]
                lines.append((int(batch.rows[place]), self._line(host, one)))
                if host.images and len(shown) < self.rows * self.columns:
                    shown.append(self._draw(host, one))
        lines = data.gather(lines)
        if not lines:
            raise records.DataError("grounding: the evaluation data hold no usable example")
        if data.first:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (data.folder / "locations.jsonl").write_text(text)
            if shown:
                (data.folder / "locations.png").write_bytes(images.encode(self._grid(shown)))
        return summary(lines)

    def check(self, batch: passes.Batch) -> None:
        """Raises DataError unless there is at most one true place for each image."""
        for place in batch.scored():
            self._true(batch.hosts[place])

    def _true(self, host):
        truth = host.truth
        if len(truth.boxes_xyxy_px) > 1 or len(truth.masks) > 1:
            raise records.DataError(
                f"grounding: {host.id} has {len(truth.boxes_xyxy_px)} true boxes and "
                f"{len(truth.masks)} masks; an expression means one place"
            )
        return truth

    def _line(self, host: answer.Host, said: answer.Answer) -> dict[str, Any]:
        """What is known of one image, as JSON."""
        truth = self._true(host)
        line: dict[str, Any] = {"id": host.id, "size": list(host.size)}
        count = max(len(said.boxes_xyxy_px), len(said.masks))
        line["said"] = count
        line["target"] = bool(len(truth.boxes_xyxy_px) or truth.masks)
        counts = count == 1 or (count > 1 and self.several == "first")
        if len(truth.boxes_xyxy_px):
            line["true_box"] = np.float64(truth.boxes_xyxy_px[0]).tolist()
            line["box_iou"] = 0.0
            if counts and len(said.boxes_xyxy_px):
                pair = (np.float64(x.boxes_xyxy_px[:1]) for x in (said, truth))
                line["box_iou"] = float(_ordered_iou(*pair)[0])
        if truth.masks or (said.masks and not line["target"]):
            shape = truth.masks[0].size if truth.masks else said.masks[0].size
            empty = np.zeros(shape, bool)
            true = annotations.decode(truth.masks[0]) if truth.masks else empty
            found = annotations.decode(said.masks[0]) if counts and said.masks else empty
            if found.shape != true.shape:
                raise records.DataError(
                    f"grounding: {host.id}: a mask of {found.shape} for an image of {true.shape}"
                )
            line["both"], line["either"] = int((found & true).sum()), int((found | true).sum())
        if problem := said.problem:
            line["problem"] = problem
        return line | {"answer": said.to_json()}

    def _draw(self, host, said):
        """The image with true and said places, uint8[cell, cell, 3]."""
        height, width = host.size
        picture = host.images[0]
        if picture.shape[0] == picture.shape[1] and height != width:
            # It lies in the middle of a square.
            side = picture.shape[0]
            rows, cols = (round(side * x / max(height, width)) for x in (height, width))
            y, x = (side - rows) // 2, (side - cols) // 2
            picture = picture[y : y + rows, x : x + cols]
        canvas = images.resize(picture, (height, width)).astype(np.float32)
        for one, colour in ((host.truth, _GREEN), (said, _RED)):
            for rle in one.masks:
                inside = annotations.decode(rle)
                canvas[inside] = 0.5 * canvas[inside] + 0.5 * np.array(colour)
        drawn = Image.fromarray(canvas.astype(np.uint8))
        pen = ImageDraw.Draw(drawn)
        for one, colour in ((host.truth, _GREEN), (said, _RED)):
            for x0, y0, x1, y1 in np.clip(one.boxes_xyxy_px, 0, max(height, width)).tolist():
                if x1 >= x0 and y1 >= y0:
                    line = max(1, max(height, width) // 150)
                    pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)
        return images.resize(images.pad_square(np.array(drawn)), self.cell)

    def _grid(self, shown):
        return images.draw_grid(
            [shown[i : i + self.columns] for i in range(0, len(shown), self.columns)],
            cell=self.cell,
        )


def summary(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The scores of the module from the lines of all images."""
    result = {"images": float(len(lines)), "unreadable": _share("problem" in x for x in lines)}
    wanted = [line for line in lines if line["target"]]
    if wanted:
        result["nothing_said"] = _share(line["said"] == 0 for line in wanted)
        result["several_said"] = _share(line["said"] > 1 for line in wanted)
    absent = [line for line in lines if not line["target"]]
    if absent:
        result["false_alarm"] = _share(line["said"] > 0 for line in absent)
    boxed = [line for line in lines if "box_iou" in line]
    if boxed:
        result |= _of_boxes(boxed)
    masked = [line for line in lines if "both" in line]
    if any(line["target"] for line in masked):
        result |= _of_masks(masked, [line for line in absent if "both" not in line])
    return result


def _of_boxes(lines):
    iou_n = np.array([line["box_iou"] for line in lines])
    result = {"box_iou": float(iou_n.mean())}
    for percent in THRESHOLDS:
        result[f"acc_{percent}"] = float((iou_n > percent / 100).mean())
    result["acc_50_low"], result["acc_50_high"] = intervals.bootstrap(iou_n > 0.5)
    true = np.array([line["true_box"] for line in lines])
    sides = np.array([[*line["size"][::-1], *line["size"][::-1]] for line in lines], np.float64)
    guesses = {"centre": np.array([0.25, 0.25, 0.75, 0.75]), "mean": (true / sides).mean(axis=0)}
    for name, guess in guesses.items():
        found = masks.box_iou(guess * sides, true)
        result[f"{name}_acc_50"] = float((found > 0.5).mean())
        result[f"{name}_box_iou"] = float(found.mean())
    return result


def _of_masks(lines, quiet):
    """`quiet`: images without a target for which nothing was said, and so no mask is there."""
    sums_ns = np.array([[x["both"], x["either"]] for x in lines] + [[0, 0]] * len(quiet))
    both_n, either_n = sums_ns.T
    iou_n = np.where(either_n > 0, both_n / np.maximum(either_n, 1), 1.0)

    def ciou(sums_ds):
        return sums_ds[:, 0] / np.maximum(sums_ds[:, 1], 1)

    result = {"ciou": float(ciou(sums_ns.sum(axis=0)[None])[0]), "giou": float(iou_n.mean())}
    result["ciou_low"], result["ciou_high"] = intervals.bootstrap(sums_ns, ciou)
    result["giou_low"], result["giou_high"] = intervals.bootstrap(iou_n)
    return result


def _ordered_iou(said, true):
    """IoU; 0 for a box whose corners are the wrong way round."""
    ordered = (said[:, 2:] >= said[:, :2]).all(axis=1)
    return np.where(ordered, masks.box_iou(said, true), 0.0)


def _share(flags):
    return float(np.mean([float(flag) for flag in flags]))
