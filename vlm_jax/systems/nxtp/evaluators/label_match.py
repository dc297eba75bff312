"""Predicted labels against references by meaning, beside published numbers and simple baselines.

The metric is `metrics/label_match`. The predictor takes the option `k`, the number of labels, and
its outputs are of shape [B, k, ...], so that fewer labels are the first ones of each; answers and
truth have `labels`, and the photo is the first of `Host.images`.

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
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import images, pipeline, records
from vlm_jax.encoders import text_embedder
from vlm_jax.program import config as config_lib
from vlm_jax.program import passes
from vlm_jax.systems.nxtp import label_match, label_sheet, published_labels

_SIDE = 16  # of the small photos that are compared
_NAMES = {"": "this run", "frequent": "most frequent labels", "nearest": "nearest neighbours"}


@dataclasses.dataclass
class Evaluator:
    """See the module.

    Attributes:
      predict: a predictor of labels, see the module.
      k: labels per image of the table and the main numbers.
      ks: numbers of labels of the curve; the predictor is asked for the largest.
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

    compares = True
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

    @property
    def options(self) -> dict[str, int]:
        """Of the predictor."""
        return {"k": self.ks[-1]}

    def prepare(self) -> None:
        """Loads the embedder.

        Raises:
          DataError: it cannot be had.
        """
        text_embedder.load(self.embedder)

    def run(self, data: passes.Pass) -> dict[str, float]:
        """recall, precision, f1, div_avg, div_std, and with a baseline those of the baselines.

        Also `labels` (mean number per image), `images`, and `without_reference`, the images whose
        caption gave no label: they count with one empty reference, as in the reference's code.

        Raises:
          ValueError: no readable record, or fewer labels than asked for.
        """
        embed = text_embedder.load(self.embedder)  # says at once when it cannot be had
        known = _Known.read(data.other(self.baseline), self) if self.baseline else None
        seen = self._collect(data, known)
        if not seen.references:
            raise ValueError("label_match: the evaluation data hold no readable record")
        embed(seen.words())  # all at once, in few batches; what follows finds them kept
        curves = {
            "k": {name: self._over_k(seen, name, embed) for name in seen.predictions},
            "threshold": {
                name: self._over_thresholds(seen, name, embed) for name in seen.predictions
            },
        }
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
        if data.first:
            self._write(data.folder, seen, scores, results, curves)
        return results

    def _collect(self, data, known) -> _Seen:
        lines, shown = [], []
        for batch in data.batches:
            outputs, places = data.predict(batch), batch.scored()
            by_k = {
                k: data.read({name: x[:, :k] for name, x in outputs.items()}, batch)
                for k in self.ks
            }
            photos_u8 = [batch.hosts[at].images[0] for at in places]
            guesses = known.guess(photos_u8, self.ks[-1]) if known is not None else {}
            for i, at in enumerate(places):
                host = batch.hosts[at]
                line = {
                    "id": host.id,
                    "references": [label for label, _ in host.truth.labels],
                    "ranked": by_k[self.k][at].labels,
                    "": {str(k): [label for label, _ in by_k[k][at].labels] for k in self.ks},
                    "guesses": {name: found[i] for name, found in guesses.items()},
                }
                lines.append((int(batch.rows[at]), line))
                if len(shown) < self.photos:
                    shown.append(_Shown(photos_u8[i], line["ranked"], line["references"]))
        seen = _Seen(collections.defaultdict(lambda: {k: [] for k in self.ks}), shown=shown)
        for line in data.gather(lines):
            seen.ids.append(line["id"])
            seen.references.append(line["references"])
            seen.ranked.append(line["ranked"])
            for k in self.ks:
                seen.predictions[""][k].append(line[""][str(k)])
                for name, guess in line["guesses"].items():
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
                    **{
                        key: round(float(getattr(scores, key)[i]), 6)
                        for key in ("recall", "precision", "f1")
                    },
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        table = self.table(results)
        (out_dir / "table.md").write_text(table + "\n", **records.TEXT)
        print(table)
        (out_dir / "curves.json").write_text(json.dumps(curves, indent=1) + "\n", **records.TEXT)
        _draw_curves(curves, out_dir / "curves.png")
        if seen.shown:
            entries = [label_sheet.Entry(*entry) for entry in seen.shown]
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


class _Shown(NamedTuple):
    photo_u8: np.ndarray
    ranked: Sequence[tuple[str, float]]
    references: Sequence[str]


@dataclasses.dataclass
class _Seen:
    """One pass: predictions[method][k] per image, "" being the model, and what belongs to it."""

    predictions: dict[str, dict[int, list[list[str]]]]
    ranked: list[list[tuple[str, float]]] = dataclasses.field(default_factory=list)
    references: list[list[str]] = dataclasses.field(default_factory=list)
    ids: list[str] = dataclasses.field(default_factory=list)
    shown: list[_Shown] = dataclasses.field(default_factory=list)

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
    def read(cls, batches: Iterable[passes.Batch], evaluator: Evaluator) -> _Known:
        labels, small, counts = [], [], collections.Counter()
        for batch in batches:
            for row in batch.scored():
                references = [label for label, _ in batch.hosts[row].truth.labels]
                counts.update(references)
                if len(labels) < evaluator.baseline_photos:
                    labels.append(references)
                    small.append(_shrink(batch.hosts[row].images[0]))
        if not counts:
            raise ValueError("label_match: the data of `baseline` hold no label")
        return cls(labels, np.stack(small), counts)

    def guess(self, photos_u8: Sequence[np.ndarray], k: int) -> dict[str, list[list[str]]]:
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
                        f" {point[kind]:g}",
                        (x, y),
                        fontsize=8,
                        xytext=(3, 3),
                        textcoords="offset points",
                    )
        axes.set_title(f"by {'number of labels' if kind == 'k' else kind}", fontsize=10)
        axes.set_xlabel("recall", fontsize=9)
        axes.set_ylabel("precision", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
