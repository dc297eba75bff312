"""Questions with yes or no for an answer: is there a dog in the image? (POPE, arXiv 2305.10355)

    accuracy, precision, recall, f1    yes is the positive; as NExT-Chat reads answers
    yes_rate                           share of the answers that are a yes
    accuracy_first_word                the first yes or no counts, in any case; none is wrong
    unclear                            share of the answers with neither word
    always_yes_accuracy                what saying yes always is worth

`accuracy_low` and `accuracy_high` are the ends of a 95 % interval. `yes_no.jsonl` has a line per
question. Other labels of the same questions (RePOPE) are other data.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from vlm_jax.data import records
from vlm_jax.metrics import intervals, yes_no
from vlm_jax.program import passes


@dataclasses.dataclass
class Evaluator:
    """See the module.

    Attributes:
      predict: a predictor whose outputs the formatter reads as text.
    """

    predict: str

    compares = True
    baselines = {"always_yes_accuracy": "accuracy"}

    def run(self, data: passes.Pass) -> dict[str, float]:
        """Scores over one pass; see the module.

        Raises:
          DataError: no question could be read, or one whose truth is neither yes nor no.
        """
        lines: list[tuple[int, dict[str, Any]]] = []
        for batch in data.batches:
            said = data.answers(batch)
            for place in batch.scored():
                host = batch.hosts[place]
                line = {"id": host.id, "question": host.caption, "true": _truth(host)}
                line["answer"] = said[place].text
                lines.append((int(batch.rows[place]), line))
        lines = data.gather(lines)
        if not lines:
            raise records.DataError("yes_no: the evaluation data hold no usable question")
        if data.first:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (data.folder / "yes_no.jsonl").write_text(text)
        return summary(lines)

    def check(self, batch: passes.Batch) -> None:
        """Raises DataError unless the truth of every question is yes or no."""
        for place in batch.scored():
            _truth(batch.hosts[place])


def _truth(host) -> str:
    found = yes_no.first_word(host.truth.text)
    if not found:
        raise records.DataError(
            f"yes_no: the true answer of {host.id} is {host.truth.text!r:.60}, neither yes nor no"
        )
    return found


def summary(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The scores of the module from the lines of all questions."""
    true_n = np.array([line["true"] == "yes" for line in lines])
    said_n = np.array([yes_no.stated(line["answer"]) != "no" for line in lines])
    first = [yes_no.first_word(line["answer"]) for line in lines]
    result = yes_no.scores(said_n, true_n)
    low, high = intervals.bootstrap(said_n == true_n)
    result |= {"accuracy_low": low, "accuracy_high": high}
    right = [word == line["true"] for word, line in zip(first, lines)]
    return result | {
        "accuracy_first_word": float(np.mean(right)),
        "unclear": float(np.mean([not word for word in first])),
        "always_yes_accuracy": float(true_n.mean()),
        "questions": float(len(lines)),
    }
