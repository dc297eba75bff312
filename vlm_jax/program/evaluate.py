"""Runs the configured evaluators on parameters, inside training and alone.

An evaluator is a module with a dataclass `Evaluator`, found by its name (`task.resolve`). Its
fields are the leftover keys of `config.evals.<name>`, among them `predict`, the name of the task's
predictor, and `needs`, the keys of its outputs that are read here. They are compared before the
first step.

    class Evaluator:
        predict: str = "score"
        needs = ("logp",)

        def run(self, data: passes.Pass) -> dict[str, float]: ...

Optional members:

    compares = True    `run` asks for answers and their truth: the formatter must read outputs
    options -> dict    keyword arguments of the predictor that follow from the evaluator's fields;
                       `evals.<name>.options` gives others
    baselines          {"unigram": "perplexity"} names scores that others are compared with;
                       curves.png draws them together
    prepare()          before training begins: fetches what `run` will need, raises without it
    check(batch)       raises ValueError when the first batch is not what it scores

No evaluator knows a task: answers come from the formatter (see `task.Formatter`), in the words of
`vlm_jax.answer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm_jax import task as task_lib
from vlm_jax.checkpoints import commit_marker
from vlm_jax.data import pipeline, records
from vlm_jax.ops import partition
from vlm_jax.program import config as config_lib
from vlm_jax.program import passes, sharding


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One entry of `config.evals`.

    Attributes:
      type: module in `vlm_jax/evaluators`, or a dotted name.
      data: a `DataConfig`'s fields; read in order, once. An evaluation with an empty `path` in it
        is inactive: recipes list what can be evaluated once there are data.
      formatter: fields of `task.prompt_formatter`; empty takes the formatter of the run.
      options: keyword arguments of the predictor, for example `dict(k=20)`; what they are is fixed
        when it is compiled.
      every: steps between evaluations; 0 only at the end.
      batch_size: rows of a global batch.
      max_batches: stop after this many batches; 0 reads everything.
      fields: what goes to the Evaluator.
    """

    type: str
    data: Mapping[str, Any]
    formatter: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the predictor."""
        return {**self.config.options, **getattr(self.evaluator, "options", {})}


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
        look(
            evaluation.data,
            _sides(evaluation, task, formatter)[0],
            f"evals.{evaluation.name}.data",
        )
        check(evaluation, task, formatter, params, seed)


def check(evaluation: Evaluation, task: Any, formatter: Any, params: Any, seed: int = 0) -> None:
    """Raises ConfigError unless the task predicts what the evaluator reads. Allocates no network.

    Args:
      evaluation, task, formatter: see above.
      params: shapes are enough.
      seed: of the run.
    """
    where, kind = f"evals.{evaluation.name}", evaluation.config.type
    evaluator = evaluation.evaluator
    _, reader = _sides(evaluation, task, formatter)
    if getattr(evaluator, "compares", False) and not hasattr(reader, "read"):
        raise config_lib.ConfigError(
            f"{where}: the evaluator {kind!r} compares answers, and {type(reader).__name__} reads "
            "none from what a predictor gives"
        )
    name, needs = evaluator.predict, tuple(getattr(evaluator, "needs", ()))
    reading = getattr(reader, "needs", ()) if getattr(evaluator, "compares", False) else ()
    if name not in task.predict:
        raise config_lib.ConfigError(
            f"{where}.predict={name!r}{config_lib.nearest(name, task.predict)}"
        )
    _check_options(evaluation, task.predict[name])
    getattr(evaluator, "prepare", lambda: None)()
    try:
        first = _first(evaluation, task, formatter, seed)
        getattr(evaluator, "check", lambda batch: None)(first)
    except records.DataError:  # names the data itself
        raise
    except ValueError as error:
        raise config_lib.ConfigError(f"{where}: {error}") from error
    predictor = functools.partial(task.predict[name], **evaluation.options)
    try:
        outputs = jax.eval_shape(predictor, params, first.arrays, jax.random.key(0))
    except (ValueError, TypeError) as error:
        raise config_lib.ConfigError(
            f"{where}: predict[{name!r}] cannot take these data: {error}"
        ) from error
    for who, keys in ((f"the evaluator {kind!r}", needs), ("reading its answers", reading)):
        if missing := [key for key in keys if key not in outputs]:
            raise config_lib.ConfigError(
                f"{where}: predict[{name!r}] gives {', '.join(sorted(outputs))}, "
                f"and {who} also needs {', '.join(missing)}"
            )


def _check_options(evaluation: Evaluation, predictor: Callable[..., Any]) -> None:
    known = list(inspect.signature(predictor).parameters.values())[3:]
    names = [parameter.name for parameter in known]
    for key in set(getattr(evaluation.evaluator, "options", {})) & set(evaluation.config.options):
        raise config_lib.ConfigError(
            f"evals.{evaluation.name}.options.{key} follows from the evaluator's own fields "
            f"({evaluation.config.type}); leave it out"
        )
    for key, value in evaluation.options.items():
        if key not in names and not any(p.kind is p.VAR_KEYWORD for p in known):
            raise config_lib.ConfigError(
                f"evals.{evaluation.name}.options.{key}: "
                f"predict[{evaluation.evaluator.predict!r}] takes no such thing"
                f"{config_lib.nearest(key, names)}"
            )
        if not isinstance(value, str | int | float | bool | None):
            raise config_lib.ConfigError(
                f"evals.{evaluation.name}.options.{key}={value!r:.80} is no number and no text"
            )


def _first(evaluation: Evaluation, task: Any, formatter: Any, seed: int) -> passes.Batch:
    """The first batch, all rows of it; fails early when its data are not there."""
    config = dataclasses.replace(evaluation.config, max_batches=1)  # nothing is read ahead
    evaluation = dataclasses.replace(evaluation, config=config)
    batches = _batches(evaluation, _sides(evaluation, task, formatter), seed)
    try:
        return next(batches)
    finally:
        batches.close()


def first_arrays(
    evaluation: Evaluation, task: Any, formatter: Any, seed: int
) -> Mapping[str, np.ndarray]:
    """The arrays of the first batch of an evaluation."""
    return _first(evaluation, task, formatter, seed).arrays


def for_inference(task: Any, mesh: Any, params: Any) -> Any:
    """The parameters as the task wants them for decoding, once for many predictions.

    Whoever gave `params` should let go of them: for a moment both are there.
    """
    convert = getattr(task, "inference_params", None)
    if convert is None:
        return params
    abstract = jax.eval_shape(convert, params)
    shardings = sharding.of_params(mesh, task.inference_rules, abstract)
    return jax.jit(convert, out_shardings=shardings)(params)


class Runner:
    """Compiles each predictor once and runs evaluators on any parameters of that shape."""

    def __init__(self, task: Any, formatter: Any, mesh: Any, param_shardings: Any, seed: int):
        self._task, self._formatter, self._mesh = task, formatter, mesh
        self._param_shardings, self._seed = param_shardings, seed
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, evaluation: Evaluation, params: Any, out_dir: pathlib.Path
    ) -> dict[str, float]:
        """One evaluator's scalars; its pictures are written to `out_dir/<name>`."""
        rng = jax.random.fold_in(jax.random.key(self._seed), 2)
        calls = itertools.count()
        batch_size = evaluation.config.batch_size
        rows = sharding.rows_of_process(self._mesh, batch_size)
        predictor = self._predictor(evaluation)
        sides = _sides(evaluation, self._task, self._formatter)

        def predict(batch: passes.Batch) -> dict[str, np.ndarray]:
            placed = sharding.place_batch(self._mesh, batch.arrays, rows, batch_size)
            with partition.use_mesh(self._mesh):
                # Another key every time, so that a batch can be predicted more than once.
                made = predictor(params, placed, jax.random.fold_in(rng, next(calls)))
            return jax.tree.map(lambda x: np.asarray(x)[rows], made)

        def other(fields: Mapping[str, Any]) -> Iterator[passes.Batch]:
            name = f"evals.{evaluation.name}"
            data = config_lib.section(pipeline.DataConfig, fields, name)
            config = dataclasses.replace(evaluation.config, max_batches=0)
            changed = dataclasses.replace(evaluation, data=data, config=config)
            return _batches(changed, sides, self._seed)

        folder = out_dir / evaluation.name
        folder.mkdir(parents=True, exist_ok=True)
        owned = sharding.owned_rows(self._mesh, batch_size)
        results = evaluation.evaluator.run(
            passes.Pass(
                batches=_batches(evaluation, sides, self._seed, rows, owned),
                predict=predict,
                read=lambda outputs, batch: sides[1].read(outputs, batch.hosts),
                other=other,
                folder=folder,
                first=jax.process_index() == 0,
            )
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

    def _predictor(self, evaluation: Evaluation) -> Callable[..., Any]:
        name, options = evaluation.evaluator.predict, evaluation.options
        key = name, tuple(sorted(options.items()))
        if key not in self._compiled:
            everywhere = sharding.replicated(self._mesh)
            self._compiled[key] = jax.jit(
                functools.partial(self._task.predict[name], **options),
                in_shardings=(self._param_shardings, sharding.of_batch(self._mesh), everywhere),
                out_shardings=everywhere,
            )
        return self._compiled[key]


def _sides(evaluation: Evaluation, task: Any, formatter: Any) -> tuple[Any, Any]:
    """What makes examples of records, and what reads outputs: of prompts, or those of the run."""
    fields = evaluation.config.formatter
    if not fields:
        reader = getattr(task, "row_reader", lambda formatter: formatter)(formatter)
        return formatter, reader
    name = f"evals.{evaluation.name}.formatter"
    if not hasattr(task, "prompt_formatter"):
        raise config_lib.ConfigError(
            f"{name}: {type(task).__name__} makes no prompts; leave it out to use the run's own"
        )
    try:
        made = config_lib.call(functools.partial(task.prompt_formatter, formatter), fields, name)
    except (TypeError, ValueError) as error:
        raise config_lib.ConfigError(f"{name}: {error}") from error
    return made, made


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


def _batches(
    evaluation: Evaluation,
    sides: tuple[Any, Any],
    seed: int,
    rows: np.ndarray | None = None,
    owned: np.ndarray | None = None,
) -> Generator[passes.Batch, None, None]:
    """One pass in order.

    Args:
      sides: formatter and reader.
      rows: of a global batch, those that this process reads; None is all.
      owned: those of them that it scores; None is all of them.
    """
    formatter, reader = sides
    size = evaluation.config.batch_size
    rows = np.arange(size) if rows is None else rows
    mine = np.ones(len(rows), bool) if owned is None else np.isin(rows, owned)
    batches = pipeline.one_pass(
        evaluation.data,
        formatter,
        batch_size=size,
        max_batches=evaluation.config.max_batches,
        seed=seed,
        rows=rows,
    )
    compares = getattr(evaluation.evaluator, "compares", False)
    with contextlib.closing(batches):
        for batch in batches:
            arrays, hosts = batch.arrays, batch.hosts
            # Packed rows say by their weights which of them are only there to fill the batch.
            valid = arrays["valid"] if "valid" in arrays else arrays["weights"].any(axis=1)
            if hasattr(reader, "collate"):
                arrays, hosts = reader.collate(arrays, hosts, truth=compares)
            yield passes.Batch(arrays, hosts, valid & mine, batch.step * size + rows)
