"""`--mode=evaluate`: scores the checkpoint of a run, or weights, without training.

What is scored is the step as its own meta.json says it was configured. A recipe that makes
something else of its parameters is refused. Results of the same settings as in training lie where
training puts them; those of other settings get a folder and a line of their own, and nothing else
in the workdir is touched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from etils import epath

from vlm_jax import checkpoints
from vlm_jax.checkpoints import step_folders
from vlm_jax.program import config as config_lib
from vlm_jax.program import evaluate, resume, scores, starting_point

FILE = "evaluation.jsonl"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is scored: a step of a run, or the weights that `init` names.

    Attributes:
      step: the checkpoint; None for weights.
      settings: what differs from the evaluations made in training; empty is nothing.
    """

    step: checkpoints.Step | None
    settings: Mapping[str, Any]

    @property
    def number(self) -> int:
        """Updates made."""
        return self.step.number if self.step else 0

    @property
    def folder(self) -> str:
        """Name of the folder of results below `eval`."""
        if not self.settings:
            return f"{self.number:08d}"
        text = json.dumps(self.settings, sort_keys=True, default=str)
        return f"{self.number:08d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def find(recipe: Any, workdir: pathlib.Path, given: Collection[str] | None) -> Subject:
    """The newest good checkpoint of the workdir, else what `init` names explicitly.

    Args:
      recipe: `run.Recipe`.
      workdir: of the run.
      given: keys given on the command line; None counts the whole recipe as given. What a recipe
        starts its training from is no answer to which model is to be scored.

    Raises:
      ConfigError: there is neither.
      CheckpointError: the checkpoints that are there cannot be used.
    """
    folder = epath.Path(workdir) / "checkpoints"
    if step_folders.steps(folder):
        return Subject(checkpoints.find(workdir), {})
    named = {
        key: value
        for key, value in (("init.run", recipe.init.run), ("init.upstream", recipe.init.upstream))
        if value and (given is None or {key, "init"} & set(given))
    }
    if not named:
        why = "is empty of checkpoints" if workdir.exists() else "does not exist"
        raise config_lib.ConfigError(
            f"nothing to evaluate: --workdir={workdir} {why}. To score weights instead of a run, "
            "name them: --config.init.run=RUN or --config.init.upstream=WEIGHTS"
        )
    return Subject(None, named)


def run(
    subject: Subject,
    recipe: Any,
    task: Any,
    formatter: Any,
    workdir: pathlib.Path,
    *,
    mesh: Any,
    load_upstream: Callable[[str, Any], Any] | None,
    meta: Mapping[str, Any],
    make: Callable[[Mapping[str, Any]], tuple[Any, Any]],
) -> dict[str, float]:
    """Scores, one line of evaluation.jsonl, and pictures; the rest as in `train.fit`.

    Raises:
      ConfigError: the recipe makes something else of the checkpoint's parameters.
      EvaluationError: an evaluation raised; the others were made.
    """
    seed = recipe.train.seed
    evaluations = evaluate.make(recipe.evals)
    if subject.step:
        subject = _compare(subject, recipe, workdir, meta, make, evaluations)
        averaged = recipe.init.averaged
        params = starting_point.params_of_run(subject.step, task, mesh, averaged)
        kind = "moving average of the " if averaged and subject.step.has_average else ""
        _say(f"the {kind}parameters of step {subject.number} in {workdir}")
    else:
        compare = starting_point.comparison(recipe.init, meta["config"], make)
        params = starting_point.params_of_init(recipe, task, mesh, load_upstream, compare)
    evaluate.check_all(evaluations, task, formatter, params, seed)
    params = evaluate.for_inference(task, mesh, params)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    runner = evaluate.Runner(task, formatter, mesh, shardings, seed)
    results: dict[str, float] = {}
    failures = []
    for evaluation in evaluations:
        scored, failure = runner.attempt(evaluation, params, workdir / "eval" / subject.folder)
        results |= scored
        failures += [failure] if failure else []
    if not evaluations:
        _say("the recipe has no active evaluation")
    _tell(subject, workdir, results)
    if failures:
        raise scores.EvaluationError("\n".join(failures))
    return results


def _compare(subject, recipe, workdir, meta, make, evaluations) -> Subject:
    """With what differs from training as its settings; refuses another meaning."""
    step, seed = subject.step, recipe.train.seed
    saved = {**step.meta, "config": step.config}

    def rows_of(formatter):
        plain = [dataclasses.replace(e.config, formatter={}) for e in evaluations[:1]]
        return [
            evaluate.first_arrays(dataclasses.replace(e, config=config), None, formatter, seed)
            for e, config in zip(evaluations, plain)
        ]

    other = resume.changed_meaning(saved, meta, make, rows_of)
    if not recipe.init.insist:
        resume.refuse(other, f"step {step.number} in {workdir}", "Leave these as they were.")
    changed = resume.changes(saved["config"], meta["config"])
    parts = ("system", "model", "task", "formatter", "evals")
    settings = {
        key: new
        for key, (_, new) in (changed | other).items()
        if key.split(".")[0] in parts or key == "train.seed"
    }
    if step.has_average and not recipe.init.averaged:
        settings["init.averaged"] = False
    return dataclasses.replace(subject, settings=settings)


def _tell(subject: Subject, workdir: pathlib.Path, results: Mapping[str, float]) -> None:
    if jax.process_index() != 0:
        return
    line = {"step": subject.number, **results}
    if subject.settings:
        line = {**line, "settings": subject.settings, "folder": f"eval/{subject.folder}"}
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, default=str) + "\n")
    if subject.settings:
        _say(f"other settings than in training; pictures are in {workdir / line['folder']}")
    for key, value in results.items():
        print(f"{key} = {value:.6g}", file=sys.stdout)


def _say(message: str) -> None:
    if jax.process_index() == 0:
        print(f"[evaluate] {message}", file=sys.stderr, flush=True)
