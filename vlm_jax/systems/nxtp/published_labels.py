"""Published scores of label prediction, to print beside ours.

Yue et al., arXiv 2312.02142: recall, precision, F1 as `systems.nxtp.label_match` defines them, with
references from the captions of each data set.
"""

from __future__ import annotations

from typing import NamedTuple

DATASETS = ("cc3m", "coco", "openimages", "imagenet")


class Row(NamedTuple):
    """One method.

    Attributes:
      method: as the paper calls it.
      source: table of the paper, or "released": the documentation of the released checkpoints.
      params_b: parameters, in thousand millions; 0 where not stated.
      k: labels per image.
      embedder: "minilm" or "clip".
      scores: data set -> (recall, precision, f1).
    """

    method: str
    source: str
    params_b: float
    k: int
    embedder: str
    scores: dict[str, tuple[float, float, float]]


def _row(method, source, params_b, k, *scores, embedder="minilm"):
    return Row(method, source, params_b, k, embedder, dict(zip(DATASETS, scores)))


ROWS = (
    _row("CLIP, test-set gallery", "1", 0.43, 10,
         (0.575, 0.448, 0.499), (0.525, 0.562, 0.540), (0.510, 0.462, 0.480)),
    _row("CaSED, 12M gallery", "1", 0.43, 10,
         (0.648, 0.471, 0.540), (0.582, 0.592, 0.584), (0.534, 0.470, 0.494)),
    _row("CLIP, extended gallery", "1", 0.43, 10,
         (0.451, 0.383, 0.409), (0.429, 0.483, 0.450), (0.386, 0.363, 0.371)),
    _row("CaSED, 403M gallery", "1", 0.43, 10,
         (0.653, 0.481, 0.548), (0.616, 0.629, 0.620), (0.560, 0.494, 0.519)),
    _row("OpenFlamingo MPT (list)", "1", 8.13, 10,
         (0.554, 0.569, 0.553), (0.556, 0.793, 0.646), (0.555, 0.635, 0.584)),
    _row("LLaVA-1.0 (caption)", "1", 13.3, 10,
         (0.634, 0.460, 0.528), (0.688, 0.668, 0.675), (0.610, 0.511, 0.550)),
    _row("LLaVA-1.5 (caption)", "1", 13.4, 10,
         (0.632, 0.453, 0.522), (0.679, 0.649, 0.661), (0.611, 0.508, 0.549)),
    _row("BLIP-2 (caption)", "1", 12.2, 10,
         (0.600, 0.539, 0.561), (0.600, 0.893, 0.714), (0.523, 0.626, 0.561)),
    _row("InstructBLIP (caption)", "1", 12.3, 10,
         (0.639, 0.487, 0.546), (0.690, 0.662, 0.673), (0.647, 0.539, 0.581)),
    _row("InstructBLIP (instruct)", "1", 12.3, 10,
         (0.529, 0.604, 0.555), (0.569, 0.879, 0.686), (0.561, 0.698, 0.615)),
    _row("NXTP, G3M", "1", 1.78, 10,
         (0.738, 0.530, 0.611), (0.700, 0.712, 0.702), (0.613, 0.544, 0.570)),
    _row("NXTP, G70M", "1", 1.78, 10,
         (0.722, 0.512, 0.593), (0.765, 0.757, 0.758), (0.663, 0.564, 0.603)),
    _row("NXTP, G3M checkpoint", "released", 1.78, 10,
         (0.73970, 0.53118, 0.61234), (0.70325, 0.71873, 0.70859), (0.61588, 0.54895, 0.57380)),
    _row("NXTP, G70M checkpoint", "released", 1.78, 10,
         (0.72099, 0.51171, 0.59288), (0.76546, 0.75607, 0.75811), (0.66123, 0.56283, 0.60118)),
    _row("NXTP, G3M", "A.10", 1.78, 5,
         (0.673, 0.598, 0.627), (0.618, 0.799, 0.695), (0.560, 0.595, 0.570)),
    _row("NXTP, G70M", "A.10", 1.78, 5,
         (0.659, 0.577, 0.609), (0.674, 0.866, 0.755), (0.594, 0.615, 0.597)),
    _row("NXTP", "9", 1.78, 100,
         (0.868, 0.394, 0.538), (0.930, 0.499, 0.649), (0.874, 0.448, 0.589)),
    _row("CLIP, base gallery", "9", 0.43, 100,
         (0.752, 0.360, 0.483), (0.715, 0.430, 0.536), (0.666, 0.387, 0.485)),
    _row("CLIP, extended gallery", "9", 0.43, 100,
         (0.615, 0.332, 0.427), (0.576, 0.411, 0.478), (0.506, 0.334, 0.399)),
    _row("NXTP, G70M", "A.8", 1.78, 10,
         (0.908, 0.825, 0.864), (0.915, 0.911, 0.913), (0.881, 0.838, 0.858), embedder="clip"),
    Row("NXTP, ImageNet-1k", "released", 1.78, 10, "minilm", {"imagenet": (0.896, 0.432, 0.574)}),
)  # fmt: skip


def rows(dataset: str, k: int, embedder: str) -> list[Row]:
    """What was published for this data set, number of labels and embedding.

    Raises:
      ValueError: unknown data set.
    """
    if dataset not in DATASETS:
        raise ValueError(f"no published scores of {dataset!r}; known: {', '.join(DATASETS)}")
    return [r for r in ROWS if dataset in r.scores and (r.k, r.embedder) == (k, embedder)]
