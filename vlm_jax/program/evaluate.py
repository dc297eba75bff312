"""Runs the configured evaluators on parameters, inside training and alone.

An evaluator is `vlm_jax/evaluators/<type>.py` with a dataclass `Evaluator`: its fields are the
leftover keys of `config.evals.<name>`, among them `predict`, the name of the task's predictor, and
`needs`, the prediction keys that it reads. They are compared before the first step.

    class Evaluator:
        predict: str = "score"
        needs = ("logp",)

        def run(self, *, task, predict, batches, read, out_dir) -> dict[str, float]:
            # predict(batch) -> numpy arrays of the global batch; batches: one pass, each a dict of
            # numpy arrays with `valid` bool[B], False on the rows that fill up the last batch,
            # and `record_ids`, a list of names per row;
            # read(fields of a DataConfig) -> batches of other data, for baselines;
            # pictures go to out_dir (None on all processes but the first).

Optional: `baselines = {"unigram": "perplexity"}` names scores that others are compared with, and
curves.png draws them together; `task_needs = ("decode_batch",)` names members of the task that
`run` calls; before training begins, `prepare(task)` fetches what `run` will need and raises when it
cannot work, and `check_batch(batch)` raises ValueError when the first batch is not what it scores.

A batch passes `task.encode_batch`, where the task has it, before the evaluator sees it: prompts of
pictures become ids there. What that puts into nested dicts stays on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm_jax import task as task_lib
from vlm_jax.checkpoints import commit_marker
from vlm_jax.data import pipeline
from vlm_jax.ops import partition
from vlm_jax.program import config as config_lib
from vlm_jax.program import sharding


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One entry of `config.evals`.

    Attributes:
      type: module in `vlm_jax/evaluators`, or a dotted name.
      data: a `DataConfig`'s fields; read in order, once. An evaluation with an empty `path` in it
        is inactive: recipes list what can be evaluated once there are data.
      formatter: fields of `task.prompt_formatter`; empty takes the formatter of the run.
      every: steps between evaluations; 0 only at the end.
      batch_size: rows of a global batch.
      max_batches: stop after this many batches; 0 reads everything.
      fields: what goes to the Evaluator.
    """

    type: str
    data: Mapping[str, Any]
    formatter: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    every: int = 0
    batch_size: int = 8
    max_batches: int = 0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        config_lib.check_ranges(
            self,
            every=(0, math.inf),
            batch_size=(1, pipeline.MAX_BATCH_SIZE),
            max_batches=(0, math.inf),
        )


@dataclasses.dataclass
class Evaluation:
    """An evaluator with its data, ready to run at any step."""

    name: str
    config: EvalConfig
    evaluator: Any
    data: pipeline.DataConfig


def make(evals: Mapping[str, Mapping[str, Any]]) -> list[Evaluation]:
    """Evaluators from `config.evals`; inactive ones are left out and named on stderr.

    Raises:
      ConfigError: unknown type or keys.
    """
    own = {field.name for field in dataclasses.fields(EvalConfig)} - {"fields"}
    result, inactive = [], []
    for name, values in (evals or {}).items():
        if not isinstance(values, Mapping):
            raise config_lib.ConfigError(f"evals.{name}={values!r:.60} is not a dict with a 'type'")
        mine = {key: value for key, value in values.items() if key in own}
        rest = {key: value for key, value in values.items() if key not in own}
        config = config_lib.section(EvalConfig, {**mine, "fields": rest}, f"evals.{name}")
        module = task_lib.resolve(config.type, "evaluators", ("Evaluator",))
        evaluator = config_lib.section(module.Evaluator, rest, f"evals.{name}")
        data = config_lib.section(pipeline.DataConfig, config.data, f"evals.{name}.data")
        if missing := _empty_path(config_lib.plain(config.data), f"evals.{name}.data"):
            inactive.append(missing)
            continue
        result.append(Evaluation(name, config, evaluator, data))
    if inactive:
        _say_once(f"inactive evaluations, their path is empty: {', '.join(inactive)}")
    return result


def baselines(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Scalar -> the scalar that it is a baseline of, as they are called in metrics.jsonl."""
    return {
        f"eval/{evaluation.name}/{name}": f"eval/{evaluation.name}/{score}"
        for evaluation in evaluations
        for name, score in getattr(evaluation.evaluator, "baselines", {}).items()
    }


def check_all(
    evaluations: Sequence[Evaluation], task: Any, formatter: Any, params: Any, seed: int
) -> None:
    """`check` of each on its first batch: all mistakes before anything expensive."""
    for evaluation in evaluations:
        look = getattr(task, "check_data", lambda *_: None)
        reader = _formatter_of(evaluation, task, formatter)
        look(evaluation.data, reader, f"evals.{evaluation.name}.data")
        check(evaluation, task, params, first_batch(evaluation, formatter, seed, task))


def check(evaluation: Evaluation, task: Any, params: Any, batch: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the task predicts what the evaluator reads. Allocates no network.

    Args:
      evaluation, task: see above.
      params: shapes are enough.
      batch: of `first_batch`; goes through `task.encode_batch`.
    """
    for member in getattr(evaluation.evaluator, "task_needs", ()):
        if not hasattr(task, member):
            raise config_lib.ConfigError(
                f"evals.{evaluation.name}: the evaluator {evaluation.config.type!r} needs a task "
                f"with {member!r}, and {type(task).__name__} has none"
            )
    getattr(evaluation.evaluator, "prepare", lambda task: None)(task)
    batch = _encode(task, batch)
    try:
        getattr(evaluation.evaluator, "check_batch", lambda batch: None)(batch)
    except ValueError as error:
        raise config_lib.ConfigError(f"evals.{evaluation.name}: {error}") from error
    name, needs = evaluation.evaluator.predict, getattr(evaluation.evaluator, "needs", ())
    if name not in task.predict:
        raise config_lib.ConfigError(
            f"evals.{evaluation.name}.predict={name!r}{config_lib.nearest(name, task.predict)}"
        )
    arrays = {key: x for key, x in batch.items() if isinstance(x, np.ndarray)}
    outputs = jax.eval_shape(task.predict[name], params, arrays, jax.random.key(0))
    missing = [key for key in needs if key not in outputs]
    if missing:
        raise config_lib.ConfigError(
            f"evals.{evaluation.name}: predict[{name!r}] gives {', '.join(sorted(outputs))}, "
            f"and the evaluator {evaluation.config.type!r} also needs {', '.join(missing)}"
        )


def first_batch(
    evaluation: Evaluation, formatter: Any, seed: int, task: Any = None
) -> dict[str, np.ndarray]:
    """The first batch of an evaluation; fails early when its data are not there."""
    batches = _batches(evaluation, _formatter_of(evaluation, task, formatter), seed)
    try:
        return next(batches)
    finally:
        batches.close()


class Runner:
    """Compiles each predictor once and runs evaluators on any parameters of that shape."""

    def __init__(self, task: Any, formatter: Any, mesh: Any, param_shardings: Any, seed: int):
        self._task, self._formatter, self._mesh = task, formatter, mesh
        self._param_shardings, self._seed = param_shardings, seed
        self._compiled: dict[str, Callable[..., Any]] = {}

    def __call__(
        self, evaluation: Evaluation, params: Any, out_dir: pathlib.Path
    ) -> dict[str, float]:
        """One evaluator's scalars; its pictures are written to `out_dir/<name>`."""
        rng = jax.random.fold_in(jax.random.key(self._seed), 2)
        calls = itertools.count()
        batch_size = evaluation.config.batch_size
        rows = sharding.rows_of_process(self._mesh, batch_size)
        predictor = self._predictor(evaluation.evaluator.predict)
        formatter = _formatter_of(evaluation, self._task, self._formatter)

        def predict(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            mine = {key: x[rows] for key, x in batch.items() if isinstance(x, np.ndarray)}
            placed = sharding.place_batch(self._mesh, mine, rows, batch_size)
            with partition.use_mesh(self._mesh):
                # Another key every time, so that a batch can be predicted more than once.
                return jax.tree.map(
                    np.asarray, predictor(params, placed, jax.random.fold_in(rng, next(calls)))
                )

        def encoded(of: Evaluation) -> Iterator[dict[str, Any]]:
            for batch in _batches(of, formatter, self._seed):
                yield _encode(self._task, batch)

        def read(fields: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
            name = f"evals.{evaluation.name}"
            data = config_lib.section(pipeline.DataConfig, fields, name)
            config = dataclasses.replace(evaluation.config, max_batches=0)
            return encoded(dataclasses.replace(evaluation, data=data, config=config))

        folder = None
        if jax.process_index() == 0:
            folder = out_dir / evaluation.name
            folder.mkdir(parents=True, exist_ok=True)
        results = evaluation.evaluator.run(
            task=self._task,
            predict=predict,
            batches=encoded(evaluation),
            read=read,
            out_dir=folder,
        )
        return {f"eval/{evaluation.name}/{key}": float(x) for key, x in results.items()}

    def attempt(
        self, evaluation: Evaluation, params: Any, out_dir: pathlib.Path
    ) -> tuple[dict[str, float], str]:
        """(scores, "") as by a call, or ({"eval/<name>/failed": 1.0}, why) when it raises.

        With several processes the error is raised: the others are in the middle of predicting.
        """
        try:
            return self(evaluation, params, out_dir), ""
        except (Exception, SystemExit) as error:  # a program that it calls may end itself
            if jax.process_count() > 1:
                error.add_note(f"during the evaluation {evaluation.name!r}")
                raise
            if os.environ.get("VLM_JAX_TRACE"):
                traceback.print_exc()
            why = f"the evaluation {evaluation.name!r} failed: {commit_marker.one_line(error)}"
            return {f"eval/{evaluation.name}/failed": 1.0}, why

    def _predictor(self, name: str) -> Callable[..., Any]:
        if name not in self._compiled:
            everywhere = sharding.replicated(self._mesh)
            self._compiled[name] = jax.jit(
                self._task.predict[name],
                in_shardings=(self._param_shardings, sharding.of_batch(self._mesh), everywhere),
                out_shardings=everywhere,
            )
        return self._compiled[name]


def _formatter_of(evaluation: Evaluation, task: Any, formatter: Any) -> Any:
    """The formatter of the run, or that of prompts."""
    fields = evaluation.config.formatter
    if not fields:
        return formatter
    name = f"evals.{evaluation.name}.formatter"
    if not hasattr(task, "prompt_formatter"):
        raise config_lib.ConfigError(
            f"{name}: {type(task).__name__} makes no prompts; leave it out to use the run's own"
        )
    try:
        return config_lib.call(functools.partial(task.prompt_formatter, formatter), fields, name)
    except (TypeError, ValueError) as error:
        raise config_lib.ConfigError(f"{name}: {error}") from error


def _encode(task: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    return getattr(task, "encode_batch", lambda batch: batch)(batch)


def _empty_path(values: Any, name: str) -> str:
    """Name of the first empty `path` in nested fields; "" when there is none."""
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if key == "path" and value == "":
            return f"{name}.{key}"
        if missing := _empty_path(value, f"{name}.{key}"):
            return missing
    return ""


@functools.cache
def _say_once(message: str) -> None:
    if jax.process_index() == 0:
        print(f"[evaluate] {message}", file=sys.stderr)


def _batches(evaluation: Evaluation, formatter: Any, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """One pass in order. Every process reads all rows: evaluators see whole batches."""
    batches = pipeline.one_pass(
        evaluation.data,
        formatter,
        batch_size=evaluation.config.batch_size,
        max_batches=evaluation.config.max_batches,
        seed=seed,
    )
    for batch in batches:
        # Packed rows say by their weights which of them are only there to fill the batch.
        yield batch if "valid" in batch else {**batch, "valid": batch["weights"].any(axis=1)}
