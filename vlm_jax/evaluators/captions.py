"""Captions of images or of regions, against the true ones.

    cider                   mean of CIDEr-D (`metrics.captions`), 0 ... 10; papers print 100 times
    bleu_1 ... bleu_4       of the corpus
    rouge_l                 mean over the captions
    other_cider             of the true caption of the next image: what words alone are worth
    empty                   share of the images for which nothing was said
    words                   of a caption, on average; true_words of a true one

`cider_low` and `cider_high` are the ends of a 95 % interval of the mean, the frequencies held. A
true answer of several lines is several true captions. `captions.jsonl` has a line per image.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from vlm_jax.data import records
from vlm_jax.metrics import captions, intervals
from vlm_jax.program import passes


@dataclasses.dataclass
class Evaluator:
    """See the module.

    Attributes:
      predict: a predictor whose outputs the formatter reads as text.
    """

    predict: str

    compares = True
    baselines = {"other_cider": "cider"}

    def run(self, data: passes.Pass) -> dict[str, float]:
        """Scores over one pass; see the module.

        Raises:
          DataError: no example could be read, or one without a true caption.
        """
        lines: list[tuple[int, dict[str, Any]]] = []
        for batch in data.batches:
            said = data.answers(batch)
            for place in batch.scored():
                host = batch.hosts[place]
                line = {"id": host.id, "said": said[place].text, "true": _truth(host)}
                lines.append((int(batch.rows[place]), line))
        lines = data.gather(lines)
        if not lines:
            raise records.DataError("captions: the evaluation data hold no usable example")
        result, scored = summary(lines)
        if data.first:
            text = "".join(json.dumps(line) + "\n" for line in scored)
            (data.folder / "captions.jsonl").write_text(text)
        return result

    def check(self, batch: passes.Batch) -> None:
        """Raises DataError unless every image has a true caption."""
        for place in batch.scored():
            _truth(batch.hosts[place])


def _truth(host) -> list[str]:
    found = [line for line in host.truth.text.split("\n") if captions.words(line)]
    if not found:
        raise records.DataError(f"captions: {host.id} has no true caption")
    return found


def summary(lines: list[dict[str, Any]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(the scores of the module, the lines with the scores of each)."""
    said = [captions.words(line["said"]) for line in lines]
    true = [[captions.words(text) for text in line["true"]] for line in lines]
    cider_n = captions.cider_d(said, true)
    counts = sum(captions.bleu_counts(a, b) for a, b in zip(said, true))
    rouge_n = np.array([captions.rouge_l(a, b) for a, b in zip(said, true)])
    others = [true[(i + 1) % len(true)][0] for i in range(len(true))]
    low, high = intervals.bootstrap(cider_n)
    result = {"cider": float(cider_n.mean()), "cider_low": low, "cider_high": high}
    result |= {f"bleu_{n}": captions.bleu(counts, n) for n in (1, 2, 3, 4)}
    result |= {
        "rouge_l": float(rouge_n.mean()),
        "other_cider": float(captions.cider_d(others, true).mean()),
        "empty": float(np.mean([not words for words in said])),
        "words": float(np.mean([len(words) for words in said])),
        "true_words": float(np.mean([len(words) for some in true for words in some])),
        "images": float(len(lines)),
    }
    scores = zip(lines, cider_n.tolist(), rouge_n.tolist())
    return result, [line | {"cider": a, "rouge_l": b} for line, a, b in scores]
