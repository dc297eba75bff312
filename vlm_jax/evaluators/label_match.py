"""Predicted labels against references by meaning, beside published numbers and simple baselines.

The metric is `metrics/label_match`. The task, a system that predicts labels, has on the host:

    task.labels(outputs, batch, k=None)   per row ([label, ...], [score, ...]), best first;
                                          outputs is what the predictor gave for this batch, and
                                          k only its first k labels: what a run with that k gives.
                                          ValueError when there are fewer
    task.references(batch)                per row [label, ...]
    task.photos(batch)                    uint8[B, S, S, 3]

Written to the folder of the evaluation:

    predictions.jsonl      a line per image: labels with scores, references, recall, precision, f1
    table.md               this run, the baselines and the paper's rows; also printed
    curves.json, .png      precision over recall, for numbers of labels and for thresholds
    labels.png             photos with their ranked labels

Baselines, from the training data that `baseline` names:

    frequent   the k most frequent labels, the same for every image
    nearest    the labels of the most similar training photos, by the squared difference of 16x16
               pixels, nearest first, until there are k
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import images, label_sheet, pipeline, records
from vlm_jax.encoders import text_embedder
from vlm_jax.metrics import label_match, published_labels
from vlm_jax.program import config as config_lib

_SIDE = 16  # of the small photos that are compared
_NAMES = {"": "this run", "frequent": "most frequent labels", "nearest": "nearest neighbours"}


@dataclasses.dataclass
class Evaluator:
    """See the module.

    Attributes:
      predict: a predictor whose outputs `task.labels` understands.
      k: labels per image of the table and the main numbers.
      ks: numbers of labels of the curve; the predictor must give at least the largest.
      thresholds: on the similarity, of the other curve (arXiv 2312.02142, fig. 5).
      embedder: see `text_embedder`: "minilm", or "clip:FOLDER".
      published: "cc3m", "coco", "openimages" or "imagenet" prints the paper's rows for it.
      baseline: `DataConfig` fields of the training data; empty leaves the baselines out.
      baseline_photos: training photos that are compared at most.
      photos: in the picture.
    """

    predict: str = "one_shot"
    k: int = 10
    ks: Sequence[int] = (1, 3, 5, 10)
    thresholds: Sequence[float] = (0.0, 0.3, 0.5, 1.0)
    embedder: str = "minilm"
    published: str = ""
    baseline: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    baseline_photos: int = 20_000
    photos: int = 12

    needs = ()
    task_needs = ("labels", "references", "photos")
    baselines = {
        f"{name}_{key}": key
        for name in ("frequent", "nearest")
        for key in ("recall", "precision", "f1")
    }

    def __post_init__(self):
        self.ks = sorted({*self.ks, self.k})
        if self.ks[0] < 1:
            raise ValueError(f"k={self.k} and ks={self.ks} must be at least 1")
        if self.published:
            published_labels.rows(self.published, self.k, self._kind)
        if self.baseline:
            config_lib.section(pipeline.DataConfig, self.baseline, "baseline")

    @property
    def _kind(self) -> str:
        return self.embedder.partition(":")[0]

    def prepare(self, task: Any) -> None:
        """Loads the embedder, and compares `ks` with the task's `k`, where it has one.

        Raises:
          ConfigError: the task predicts fewer labels. DataError: the embedder cannot be had.
        """
        if self.ks[-1] > getattr(task, "k", self.ks[-1]):
            raise config_lib.ConfigError(
                f"label_match asks for {self.ks[-1]} labels per image (k, ks), but task.k={task.k}"
            )
        text_embedder.load(self.embedder)

    def run(self, *, task, predict, batches, read, out_dir) -> dict[str, float]:
        """recall, precision, f1, div_avg, div_std, and with a baseline those of the baselines.

        Also `labels` (mean number per image), `images`, and `without_reference`, the images whose
        caption gave no label: they count with one empty reference, as in the reference's code.

        Raises:
          ValueError: no readable record, or fewer labels than asked for.
        """
        embed = text_embedder.load(self.embedder)  # says at once when it cannot be had
        known = _Known.read(read(self.baseline), task, self) if self.baseline else None
        seen = self._collect(task, predict, batches, known)
        if not seen.references:
            raise ValueError("label_match: the evaluation data hold no readable record")
        embed(seen.words())  # all at once, in few batches; what follows finds them kept
        curves = {
            "k": {name: self._over_k(seen, name, embed) for name in seen.predictions},
            "threshold": {name: self._over_thresholds(seen, name, embed)
                          for name in seen.predictions},
        }  # fmt: skip
        scores = label_match.match(seen.predictions[""][self.k], seen.references, embed)
        results = {
            **scores.means(),
            "labels": float(np.mean([len(x) for x in seen.predictions[""][self.k]])),
            "images": float(len(seen.references)),
            "without_reference": float(sum(not x for x in seen.references)),
        }
        for name in seen.predictions:
            if name:
                point = next(p for p in curves["k"][name] if p["k"] == self.k)
                results |= {f"{name}_{key}": point[key] for key in ("recall", "precision", "f1")}
        if out_dir is not None:
            self._write(out_dir, seen, scores, results, curves)
        return results

    def _collect(self, task, predict, batches, known) -> _Seen:
        seen = _Seen(collections.defaultdict(lambda: {k: [] for k in self.ks}))
        for batch in batches:
            outputs, valid = predict(batch), np.flatnonzero(batch["valid"])
            by_k = {k: task.labels(outputs, batch, k=k) for k in self.ks}
            references, photos_u8 = task.references(batch), task.photos(batch)
            for row in valid:
                for k in self.ks:
                    seen.predictions[""][k].append(list(by_k[k][row][0]))
                seen.ranked.append(list(zip(*by_k[self.k][row])))
                seen.references.append(list(references[row]))
                seen.ids.append("+".join(batch["record_ids"][row]))
                if len(seen.shown_u8) < self.photos:
                    seen.shown_u8.append(photos_u8[row])
            if known is not None:
                for name, guesses in known.guess(photos_u8[valid], self.ks[-1]).items():
                    for guess, k in itertools.product(guesses, self.ks):
                        seen.predictions[name][k].append(guess[:k])
        return seen

    def _over_k(self, seen, name, embed) -> list[dict[str, float]]:
        return [
            {"k": k, **label_match.match(seen.predictions[name][k], seen.references, embed).means()}
            for k in self.ks
        ]

    def _over_thresholds(self, seen, name, embed) -> list[dict[str, float]]:
        pair = seen.predictions[name][self.k], seen.references
        return [
            {"threshold": t, **label_match.match(*pair, embed, threshold=t).means()}
            for t in self.thresholds
        ]

    def _write(self, out_dir: pathlib.Path, seen, scores, results, curves) -> None:
        with (out_dir / "predictions.jsonl").open("w", **records.TEXT) as stream:
            for i, name in enumerate(seen.ids):
                line = {
                    "id": name,
                    "labels": [[label, round(float(score), 6)] for label, score in seen.ranked[i]],
                    "references": seen.references[i],
                    **{key: round(float(getattr(scores, key)[i]), 6)
                       for key in ("recall", "precision", "f1")},
                }  # fmt: skip
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        table = self.table(results)
        (out_dir / "table.md").write_text(table + "\n", **records.TEXT)
        print(table)
        (out_dir / "curves.json").write_text(json.dumps(curves, indent=1) + "\n", **records.TEXT)
        _draw_curves(curves, out_dir / "curves.png")
        if self.photos:
            entries = [
                label_sheet.Entry(*entry)
                for entry in zip(seen.shown_u8, seen.ranked, seen.references)
            ]
            sheet = label_sheet.draw(entries, shown=self.k)
            (out_dir / "labels.png").write_bytes(images.encode(sheet))

    def table(self, results: Mapping[str, float]) -> str:
        """Markdown: this run, its baselines, and the published rows of the same k and embedding."""
        where = f" on {self.published}" if self.published else ""
        lines = [
            f"Top {self.k}{where}, {int(results['images'])} images, embedding {self._kind}",
            "",
            "| method | source | params, 10^9 | recall | precision | F1 |",
            "|---|---|---|---|---|---|",
        ]
        for prefix, name in _NAMES.items():
            keys = [f"{prefix}_{key}" if prefix else key for key in ("recall", "precision", "f1")]
            if keys[0] in results:
                numbers = " | ".join(f"{results[key]:.3f}" for key in keys)
                lines.append(f"| {name if prefix else f'**{name}**'} | measured | | {numbers} |")
        rows = published_labels.rows(self.published, self.k, self._kind) if self.published else ()
        for row in rows:
            numbers = " | ".join(f"{x:.3f}" for x in row.scores[self.published])
            source = row.source if row.source == "released" else f"paper, table {row.source}"
            lines.append(f"| {row.method} | {source} | {row.params_b or ''} | {numbers} |")
        return "\n".join(lines)


@dataclasses.dataclass
class _Seen:
    """One pass: predictions[method][k] per image, "" being the model, and what belongs to it."""

    predictions: dict[str, dict[int, list[list[str]]]]
    ranked: list[list[tuple[str, float]]] = dataclasses.field(default_factory=list)
    references: list[list[str]] = dataclasses.field(default_factory=list)
    ids: list[str] = dataclasses.field(default_factory=list)
    shown_u8: list[np.ndarray] = dataclasses.field(default_factory=list)

    def words(self) -> list[str]:
        """Every label of every method and of the references, and the empty one."""
        lists = itertools.chain(
            self.references, *(x for by_k in self.predictions.values() for x in by_k.values())
        )
        return list(dict.fromkeys(("", *itertools.chain.from_iterable(lists))))


class _Known:
    """What the baselines know of the training data."""

    def __init__(self, labels: list[list[str]], small: np.ndarray, counts: collections.Counter):
        self._labels, self._small = labels, small
        self._frequent = [label for label, _ in counts.most_common()]

    @classmethod
    def read(cls, batches: Iterable[Mapping[str, Any]], task: Any, evaluator: Evaluator) -> _Known:
        labels, small, counts = [], [], collections.Counter()
        for batch in batches:
            references = task.references(batch)
            photos_u8 = task.photos(batch) if len(labels) < evaluator.baseline_photos else None
            for row in np.flatnonzero(batch["valid"]):
                counts.update(references[row])
                if len(labels) < evaluator.baseline_photos:
                    labels.append(references[row])
                    small.append(_shrink(photos_u8[row]))
        if not counts:
            raise ValueError("label_match: the data of `baseline` hold no label")
        return cls(labels, np.stack(small), counts)

    def guess(self, photos_u8: np.ndarray, k: int) -> dict[str, list[list[str]]]:
        """Up to k labels per photo and baseline."""
        if not len(photos_u8):
            return {}
        small = np.stack([_shrink(photo) for photo in photos_u8])
        distances = np.square(small).sum(1)[:, None] - 2 * small @ self._small.T
        distances += np.square(self._small).sum(1)
        return {
            "frequent": [self._frequent[:k]] * len(photos_u8),
            "nearest": [self._nearest(row, k) for row in np.argsort(distances, 1, kind="stable")],
        }

    def _nearest(self, order: np.ndarray, k: int) -> list[str]:
        labels = itertools.chain.from_iterable(self._labels[i] for i in order)
        found: dict[str, None] = {}
        for label in labels:
            found[label] = None
            if len(found) == k:
                break
        return list(found)


def _shrink(image_u8: np.ndarray) -> np.ndarray:
    return images.to01(images.resize(image_u8, _SIDE)).reshape(-1)


def _draw_curves(curves: Mapping[str, Any], path: pathlib.Path) -> None:
    """Precision over recall; nothing, with a line on stderr, where matplotlib is missing."""
    try:
        from matplotlib.backends import backend_agg
        from matplotlib.figure import Figure  # not pyplot: no display and no global state
    except ImportError:
        print(f'{path} is not drawn: pip install "vlm_jax[logging]"', file=sys.stderr)
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    for index, (kind, methods) in enumerate(curves.items()):
        axes = figure.add_subplot(1, 2, index + 1)
        for name, points in methods.items():
            recalls = [point["recall"] for point in points]
            precisions = [point["precision"] for point in points]
            axes.plot(recalls, precisions, marker="o", label=_NAMES[name])
            if not name:
                for point, x, y in zip(points, recalls, precisions):
                    axes.annotate(
                        f" {point[kind]:g}", (x, y), fontsize=8, xytext=(3, 3),
                        textcoords="offset points",
                    )  # fmt: skip
        axes.set_title(f"by {'number of labels' if kind == 'k' else kind}", fontsize=10)
        axes.set_xlabel("recall", fontsize=9)
        axes.set_ylabel("precision", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
