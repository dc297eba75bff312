"""The evaluations of a run in training: when they are due, who lacks scores, what if one fails."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax.program import evaluate, metric_writer, progress

ON_FAILURE = ("continue", "stop", "ignore")


class EvaluationError(RuntimeError):
    """Evaluations raised; what was trained is saved. The message names them."""

    exit_status = 1


def due(
    evaluations: Sequence[evaluate.Evaluation], step: int, last_step: int
) -> list[evaluate.Evaluation]:
    """Those that a run of `last_step` updates makes after `step` updates."""
    return [
        evaluation
        for evaluation in evaluations
        if step == last_step or (evaluation.config.every and step % evaluation.config.every == 0)
    ]


def missing(
    evaluations: Sequence[evaluate.Evaluation], workdir: pathlib.Path, step: int
) -> list[evaluate.Evaluation]:
    """Those that metrics.jsonl tells no scores of at `step`: interrupted, failed, or new.

    Collective: all processes go by what process 0 reads.
    """
    told = {
        tuple(key.split("/")[:2])
        for entry in metric_writer.read(workdir)
        if entry["step"] == step
        for key in entry
        if not key.endswith("/failed")
    }
    lacking = np.array([("eval", evaluation.name) not in told for evaluation in evaluations])
    if jax.process_count() > 1:
        lacking = multihost_utils.broadcast_one_to_all(lacking)
    return [each for each, lacks in zip(evaluations, lacking, strict=True) if lacks]


class Scorer:
    """Scores parameters, tells metrics.jsonl and people, and keeps account of failures.

    Args:
      runner: of the run.
      writer: receives a line per evaluation, {"eval/<name>/failed": 1.0} for one that raised.
      bar: is paused meanwhile.
      workdir: pictures go to `<workdir>/eval/<step>/<name>`.
      on_failure: one of ON_FAILURE, see `train.TrainConfig.failed_evaluation`.
      save: saves the state; called before a failure ends the run.
    """

    def __init__(
        self,
        runner: evaluate.Runner,
        writer: metric_writer.MetricWriter,
        bar: progress.Progress,
        workdir: pathlib.Path,
        on_failure: str,
        save: Callable[[], None],
    ):
        self._runner, self._writer, self._bar = runner, writer, bar
        self._workdir, self._on_failure, self._save = workdir, on_failure, save
        self._failures: list[str] = []

    def __call__(
        self, step: int, evaluations: Sequence[evaluate.Evaluation], params: Any
    ) -> dict[str, float]:
        """The scores of those that work.

        Raises:
          EvaluationError: one does not, and that is to end the run.
        """
        scores: dict[str, float] = {}
        for evaluation in evaluations:
            self._bar.pause()
            folder = self._workdir / "eval" / f"{step:08d}"
            results, failure = self._runner.attempt(evaluation, params, folder)
            self._writer.write(step, results)
            if failure:
                self._note(f"step {step}: {failure}")
            else:
                self._writer.show(step, f"eval/{evaluation.name}", folder / evaluation.name)
                scores |= results
                _say("  ".join(f"{key}={value:.5g}" for key, value in results.items()))
            self._bar.resume()
        return scores

    def _note(self, failure: str) -> None:
        _say(failure)
        self._failures.append(failure)
        if self._on_failure == "stop":
            self._save()
            self.report()

    def report(self) -> None:
        """Raises EvaluationError when any failed, unless that is ignored."""
        if self._failures and self._on_failure != "ignore":
            raise EvaluationError(
                "\n".join(self._failures) + f"\nWhat was trained is saved in {self._workdir}. Once "
                "the cause is mended, the same command makes up for the evaluations of its last "
                "step; train.failed_evaluation says whether a run goes on after one that fails"
            )


def _say(message: str) -> None:
    if jax.process_index() == 0:
        print(f"[train] {message}", file=sys.stderr, flush=True)
