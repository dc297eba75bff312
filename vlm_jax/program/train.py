"""The one training loop. It knows a paper only as a Task; see `vlm_jax/task.py`.

`fit` is the order of things: where to start, data, state (resumed, or random with weights laid over
it), compiled update, outputs, then per step: batch -> device, update, look at the *previous* step's
metrics (so that the device never waits for the host), log, save, evaluate. A paper that needs
another kind of update passes its own `step_fn`; everything else stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from vlm_jax import checkpoints
from vlm_jax.data import pipeline
from vlm_jax.machines import memory, stop_signal
from vlm_jax.ops import partition
from vlm_jax.program import config as config_lib
from vlm_jax.program import (
    curves,
    guards,
    metric_writer,
    optim,
    progress,
    resume,
    scores,
    sharding,
    starting_point,
    update,
    what_next,
    workdir_files,
)
from vlm_jax.program import evaluate as evaluate_lib

if TYPE_CHECKING:
    from vlm_jax.program.run import Recipe
    from vlm_jax.task import Formatter, Task


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and what is written.

    Attributes:
      steps: updates in all.
      batch_size: rows of one update over all devices and accumulation parts.
      accumulate: parts that a batch is cut into, worked one after the other.
      accumulate_mean: "batch": loss and gradient are those of the whole batch, however many
        supervised tokens a part has; "parts": the mean of the parts' means, as programs have it
        that divide every part by its own count.
      seed: of parameters, data order and dropout; one per run.
      log_every, save_every: in updates; save_every=0 saves only at the end.
      keep_last: checkpoints kept besides the milestones.
      milestone_every: updates between checkpoints that are kept for good; 0 has none.
      failed_evaluation: what becomes of a run when an evaluation raises: "continue" goes on and
        ends with exit status 1, "stop" saves and ends at once with status 1, "ignore" goes on and
        ends as if nothing had been. Noted in metrics.jsonl; the next start makes up for those of
        the step that it resumes from.
      tensorboard: write event files (when tensorboardX is installed).
      wandb: project name for Weights & Biases; "" is off.
      guards: limits on metrics that stop the run, by name; see `guards.py`.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    accumulate_mean: str = "batch"
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep_last: int = 3
    milestone_every: int = 0
    failed_evaluation: str = "continue"
    tensorboard: bool = True
    wandb: str = ""
    guards: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        guards.make(self.guards)
        config_lib.check_ranges(
            self,
            **dict.fromkeys(("accumulate", "log_every", "keep_last"), (1, math.inf)),
            steps=(1, 2**31 - 1),  # the state counts them in int32
            batch_size=(1, pipeline.MAX_BATCH_SIZE),
            save_every=(0, math.inf),
            milestone_every=(0, math.inf),
            seed=(0, 2**63 - 1),
        )
        if self.accumulate_mean not in ("batch", "parts"):
            raise ValueError(
                f"accumulate_mean={self.accumulate_mean!r} is neither 'batch' nor 'parts'"
            )
        if self.failed_evaluation not in scores.ON_FAILURE:
            raise ValueError(
                f"failed_evaluation={self.failed_evaluation!r} is none of "
                f"{', '.join(scores.ON_FAILURE)}"
            )


# Rows by which two formatters are compared when a recipe has changed.
_ROWS_COMPARED = 64


class TrainingStopped(RuntimeError):
    """A loss, gradient or parameter is not finite, or a guard tripped; with step and remedy."""


# The update and its state, under the names that systems know.
make_train_step = update.make_train_step
init_state = update.init_state
state_shardings = update.state_shardings


def fit(
    recipe: Recipe,
    task: Task,
    formatter: Formatter,
    workdir: pathlib.Path,
    *,
    mesh: jax.sharding.Mesh,
    load_upstream: Callable[[str, Any], Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    step_fn: Callable = make_train_step,
    make: Callable[[Mapping[str, Any]], tuple[Task, Formatter]] | None = None,
    stop: stop_signal.StopSignal | None = None,
) -> dict[str, float]:
    """Trains to `recipe.train.steps`, resuming by itself; returns the last metrics.

    Args:
      recipe: `run.Recipe`, the typed sections of a config.
      task, formatter: of the system.
      workdir: receives checkpoints, metrics.jsonl, event files, curves.png and pictures.
      mesh: of `sharding.make_mesh`.
      load_upstream: the system's reader of released weights, for `init.upstream`.
      meta: saved with every checkpoint (resolved config, versions, git revision).
      step_fn: builds the update; see `make_train_step`.
      make: config -> (task, formatter), to compare with what a checkpoint was trained with.
      stop: says when to save and stop; None is Ctrl-C and SIGTERM to this process.

    Raises:
      TrainingStopped: a loss, gradient or parameter is NaN or infinite, or a guard tripped.
      EvaluationError: evaluations raised; see `TrainConfig.failed_evaluation`.
      ConfigError, CheckpointError, DataError: see their modules.
    """
    with contextlib.ExitStack() as closing:  # last opened, first closed
        run = _Run(recipe, task, formatter, workdir, mesh, dict(meta or {}), stop, closing)
        run.find_start(make)
        run.open_data()
        if run.is_over():
            return {}
        run.make_state(load_upstream, make)
        run.compile(step_fn)
        run.open_outputs()
        run.make_up_for_evaluations()
        run.train()
        run.scorer.report()
    for line in what_next.lines(run.workdir, recipe.system, run.step):
        _say(line)
    return run.last


class _Run:
    """One run between its start and its end. Its methods are called in the order of `fit`."""

    def __init__(self, recipe: Recipe, task, formatter, workdir, mesh, meta, stop, closing):
        self.recipe, self.task, self.formatter = recipe, task, formatter
        self.workdir, self.mesh, self.meta = workdir, mesh, meta
        self.stop, self.closing = stop, closing
        self.config = recipe.train
        self.last: dict[str, float] = {}
        self.watch = guards.make(self.config.guards)
        self.evaluations = evaluate_lib.make(recipe.evals)
        self.optimizer = optim.make_optimizer(recipe.optim, self.config.steps)
        self.rng = jax.random.key(self.config.seed)
        self.abstract = jax.eval_shape(self._random_state)
        self.shardings = state_shardings(mesh, task, self.abstract)
        self.rows = sharding.rows_of_process(mesh, self.config.batch_size)
        self.saver = closing.enter_context(
            checkpoints.Checkpointer(
                workdir,
                keep_last=self.config.keep_last,
                milestone_every=self.config.milestone_every,
                create=False,
            )
        )

    # ---- before the first update ------------------------------------------------------------

    def find_start(self, make) -> None:
        """The step and row to go on from, and what has changed since they were saved."""
        workdir_files.check(self.workdir)
        self.start = self.step = self.saver.latest_good() or 0
        self.start_row, self.records_before = 0, {}
        if not self.start:
            if self.saver.passed_over():
                _say("none of the checkpoints can be used: starting from the beginning")
            return
        _say(f"resuming from step {self.start} of {self.config.steps} in {self.workdir}")
        saved = self.saver.describe(self.start)["meta"]
        self.start_row = resume.rows_seen(saved, self.start, self.config.batch_size)
        self.records_before = saved.get("data", {}).get("records", {})
        config = self.meta.get("config", {})
        resume.require_same_parameters(self.saver, self.start, self.abstract, config)
        if not ("config" in saved and "config" in self.meta and make):
            return
        changed = resume.changes(saved["config"], self.meta["config"])
        other = resume.changed_meaning(saved, self.meta, make, self._some_rows)
        if not self.recipe.init.insist:
            resume.refuse(
                other,
                f"step {self.start} in {self.workdir}",
                "Go back to the values there, or start a new run from its parameters, in another "
                f"workdir with --config.init.run={self.workdir}.",
            )
        for line in resume.show(changed | other):
            _say(f"changed since step {self.start}: {line}")
        if "train.batch_size" in changed:
            row = self.start_row
            _say(f"with this batch size data go on at row {row}: none is skipped or read twice")

    def _some_rows(self, formatter) -> list[Mapping[str, np.ndarray]]:
        everything = np.arange(self.config.batch_size)  # so that all processes see the same
        with self._batches(formatter, everything) as batches:
            number = -(-_ROWS_COMPARED // self.config.batch_size)
            return [batch.arrays for batch in itertools.islice(batches, number)]

    def open_data(self) -> None:
        """Data are looked at before anything is compiled or allocated."""
        self.batches = self.closing.enter_context(self._batches(self.formatter, self.rows))
        for name, count in self.batches.records_of.items():
            if (before := self.records_before.get(name, count)) != count:
                _say(
                    f"changed since step {self.start}: data.mixture.{name} has {count} records, "
                    f"not {before}; they come in another order from here on"
                )
        self.first = next(self.batches)
        getattr(self.task, "check_batch", lambda arrays: None)(self.first.arrays)
        evaluate_lib.check_all(
            self.evaluations,
            self.task,
            self.formatter,
            self.abstract["params"],
            self.config.seed,
        )

    def _batches(self, formatter, rows) -> pipeline.Batches:
        return pipeline.make_batches(
            self.recipe.data,
            formatter,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=self.start,
            start_row=self.start_row,
            rows=rows,
        )

    def is_over(self) -> bool:
        """Whether neither training nor evaluations are left; says so."""
        self.owed = scores.missing(self._due(), self.workdir, self.start) if self.start else []
        if self.start < self.config.steps:
            return False
        _say(f"step {self.start} of {self.config.steps} was already reached; nothing to train")
        return not self.owed

    def make_state(self, load_upstream, make) -> None:
        """The state of the checkpoint, or a random one with weights laid over it."""
        learned, _ = optim.split(self.abstract["params"], self.recipe.optim.trainable)
        for line in memory.warnings_of_training(self.abstract, self.shardings, learned):
            _say(line)
        if self.start:
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                self.abstract,
                self.shardings,
            )
            self.state, notes = resume.restore(
                self.saver, self.start, target, self._fresh_optimizer
            )
            for note in notes:
                _say(note)
        else:
            self.state = jax.jit(self._random_state, out_shardings=self.shardings)()
            init = self.recipe.init
            compare = starting_point.comparison(init, self.meta.get("config"), make)
            params = starting_point.lay_weights(
                init, self.task, self.state["params"], load_upstream, compare
            )
            self.state["params"] = params
            if self.recipe.optim.ema:
                self.state["ema"] = update.start_average(params, self.recipe)
        _say(update.describe(self.abstract, self.recipe, self.mesh))

    def _random_state(self):
        key = jax.random.fold_in(self.rng, 0)
        return init_state(self.task, self.optimizer, self.recipe, key)

    def _fresh_optimizer(self, params):
        return update.fresh_optimizer(params, self.optimizer, self.recipe)

    def compile(self, step_fn) -> None:
        """The update, and the key that it is given."""
        everywhere = sharding.replicated(self.mesh)
        self.update = jax.jit(
            step_fn(self.task, self.optimizer, self.recipe),
            in_shardings=(self.shardings, sharding.of_batch(self.mesh), everywhere),
            out_shardings=(self.shardings, everywhere),
            donate_argnums=0,
        )
        # Jitted, because device_put cannot reach the devices of other processes.
        rng = self.rng
        self.step_rng = jax.jit(lambda: jax.random.fold_in(rng, 1), out_shardings=everywhere)()
        if self.watch:
            placed = self._place(self.first)
            with partition.use_mesh(self.mesh):
                metrics = self.update.eval_shape(self.state, placed, self.step_rng)[1]
            guards.check_metrics(self.watch, metrics)

    def open_outputs(self) -> None:
        """From here on the workdir is written: every check has passed."""
        config, closing = self.config, self.closing
        if self.start and not (self.workdir / metric_writer.FILE).exists():
            _say(f"there is no {metric_writer.FILE}: it begins after step {self.start}")
        self.writer = closing.enter_context(
            metric_writer.MetricWriter(
                self.workdir,
                self.start,
                tensorboard=config.tensorboard,
                wandb=config.wandb,
                config=self.meta.get("config"),
            )
        )
        if jax.process_index() == 0:
            if self.start < config.steps:
                workdir_files.write_config(self.workdir, self.meta)
            baselines = evaluate_lib.baselines(self.evaluations)
            closing.callback(curves.draw, self.workdir, baselines)
        bar = progress.of_run(self.task, self.first, self.start, config, self.mesh)
        self.bar = closing.enter_context(contextlib.closing(bar))
        self.scorer = scores.Scorer(
            evaluate_lib.Runner(
                self.task, self.formatter, self.mesh, self.shardings["params"], config.seed
            ),
            self.writer,
            self.bar,
            self.workdir,
            config.failed_evaluation,
            self.save,
        )
        if self.stop is None:
            self.stop = stop_signal.StopSignal()
            closing.callback(self.stop.restore)

    # ---- training ---------------------------------------------------------------------------

    def train(self) -> None:
        """All updates that are left, or those until someone asks to stop."""
        config = self.config
        pending = None
        for batch in itertools.chain([self.first], self.batches):
            if self.step >= config.steps:
                break
            placed = self._place(batch)
            with partition.use_mesh(self.mesh):
                self.state, metrics = self.update(self.state, placed, self.step_rng)
            self.step += 1
            if pending:
                self._settle(*pending)
            pending = (self.step, metrics, batch)
            at_end = self.step == config.steps
            saves = at_end or (config.save_every and self.step % config.save_every == 0)
            interrupted = self.stop.asked(self.step)
            if saves or interrupted or self._due():
                self._settle(*pending)  # nothing is saved or scored after a bad update
                pending = None
            if saves or interrupted:
                self.save()
            # Someone who asks to stop is not kept waiting; the next run makes up for it.
            if interrupted:
                _say(
                    f"asked to stop: saved step {self.step}; the same command continues from there"
                )
                break
            self.evaluate(self._due())
            self.saver.check()

    def _place(self, batch):
        return sharding.place_batch(self.mesh, batch.arrays, self.rows, self.config.batch_size)

    def _settle(self, step, metrics, batch) -> None:
        """Looks at the metrics of an update that has been dispatched earlier."""
        values = {key: float(x) for key, x in jax.device_get(metrics).items()}
        if bad := guards.not_finite(values):
            others = ", ".join(
                f"{key}={values[key]:.4g}" for key in ("loss", "optim/grad_norm") if key != bad
            )
            kept = guards.keep_batch(self.workdir, step, batch, self.rows)
            raise TrainingStopped(
                f"{bad}={values[bad]} at step {step} ({others}). {kept}. {self._remedy(step)}"
            )
        for problem in filter(None, [guard.check(step, values) for guard in self.watch]):
            raise TrainingStopped(
                f"{problem.rstrip('.')}. Checkpoints of earlier steps are in {self.workdir}; after "
                f"changing the recipe the same command continues from the newest"
            )
        logs = step % self.config.log_every == 0 or step == self.config.steps
        if step == self.start + 1 or (step == self.start + 2 and not logs):
            self.bar.begin(step, values["loss"])
        if logs:
            speed = self.bar.speed(step)
            named = {f"train/{key}": value for key, value in values.items()}
            self.writer.write(step, {**named, **speed})
            if speed:
                self.bar.update(step, values["loss"], speed)
            self.last.update(values)

    def save(self) -> None:
        """Saves the state of this step, unless that was done. Metrics reach the disk first."""
        self.writer.sync()
        rows = self.start_row + (self.step - self.start) * self.config.batch_size
        position = {
            "step": self.step,
            "seed": self.config.seed,
            "rows": rows,
            "records": self.batches.records_of,
        }
        try:
            meta = {**self.meta, "data": position}
            self.saver.save(self.step, self.state, meta, must_be_finite=True)
        except checkpoints.NotFiniteError as error:
            raise TrainingStopped(f"{error}. {self._remedy(self.step)}") from error

    def _remedy(self, step) -> str:
        with contextlib.suppress(checkpoints.CheckpointError):
            self.saver.wait()  # one that is being written counts
        newest = self.saver.newest_used()
        advice = "lower optim.lr, set optim.clip_norm, or remove the records, then run the same "
        if not newest:
            return f"Nothing is saved yet; {advice}command again"
        text = f"The newest checkpoint is of step {newest}, before this; {advice}command again"
        if step == self.start + 1:
            text += (
                f". It was the first update after resuming: if it stops here again, remove "
                f"{self.saver.folder / str(newest)} to continue from an older one"
            )
        return text

    def _due(self) -> list[evaluate_lib.Evaluation]:
        return scores.due(self.evaluations, self.step, self.config.steps)

    def make_up_for_evaluations(self) -> None:
        """Those of the step resumed from that were interrupted or failed."""
        self.evaluate(self.owed)

    def evaluate(self, evaluations) -> None:
        """Scores the parameters of this step."""
        if evaluations:
            params = update.averaged(self.state, self.recipe)
            self.last.update(self.scorer(self.step, evaluations, params))


def _say(message: str) -> None:
    if jax.process_index() == 0:
        print(f"[train] {message}", file=sys.stderr, flush=True)
