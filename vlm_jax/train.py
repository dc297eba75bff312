"""The one training loop. It knows a paper only as a Task; see `vlm_jax/task.py`.

In order: mesh, shardings, state (resumed, or random with weights laid over it), compiled step,
then per step: batch -> device, update, look at the *previous* step's metrics (so that the device
never waits for the host), log, evaluate, save. A paper that needs another kind of update passes
its own `step_fn`; everything else stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax import (
    checkpoints,
    curves,
    guards,
    hardware,
    metric_writer,
    optim,
    progress,
    sharding,
    starting_point,
    stop_signal,
)
from vlm_jax import evaluate as evaluate_lib
from vlm_jax.data import pipeline
from vlm_jax.nn import functional
from vlm_jax.ops import partition


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and what is written.

    Attributes:
      steps: updates in all.
      batch_size: rows of one update over all devices and accumulation parts.
      accumulate: parts that a batch is cut into, worked one after the other; gradients are the
        mean of the parts' means.
      seed: of parameters, data order and dropout; one per run.
      log_every, save_every: in updates; save_every=0 saves only at the end.
      keep_last: checkpoints kept besides the milestones (every `milestone_every` updates).
      tensorboard: write event files (when tensorboardX is installed).
      wandb: project name for Weights & Biases; "" is off.
      guards: limits on metrics that stop the run, by name; see `guards.py`.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep_last: int = 3
    milestone_every: int = 0
    tensorboard: bool = True
    wandb: str = ""
    guards: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        guards.make(self.guards)
        for name in ("steps", "batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class TrainingStopped(RuntimeError):
    """The loss is not finite, or a guard tripped. The message has the step, the cause, a remedy."""


def make_train_step(task: Any, optimizer: optax.GradientTransformation, recipe: Any) -> Callable:
    """(state, batch, rng) -> (state, metrics). Metrics are of the parameters before the update."""
    settings = recipe.optim
    schedule = optim.make_schedule(settings, recipe.train.steps)
    loss_at = getattr(task, "loss_at", lambda *args, step: task.loss(*args))
    after_update = getattr(task, "after_update", None)

    def train_step(state, batch, rng):
        learned, frozen = optim.split(state["params"], settings.trainable)
        rng = jax.random.fold_in(rng, state["step"])

        def loss_and_grad(piece, index):
            def loss_fn(learned):
                params = optim.merge(learned, frozen)
                key = jax.random.fold_in(rng, index)
                return loss_at(params, piece, key, step=state["step"])

            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(learned)
            return grads, {"loss": loss, **metrics}

        grads, metrics = optim.accumulate(loss_and_grad, batch, recipe.train.accumulate)
        updates, opt_state = optimizer.update(grads, state["opt_state"], learned)
        learned = optax.apply_updates(learned, updates)
        new = {
            "step": state["step"] + 1,
            "params": optim.merge(learned, frozen),
            "opt_state": opt_state,
        }
        if settings.ema:
            new["ema"] = optax.incremental_update(learned, state["ema"], 1 - settings.ema)
        if after_update:
            new = after_update(new, batch, jax.random.fold_in(rng, recipe.train.accumulate))
        metrics["optim/grad_norm"] = optax.tree.norm(grads)
        metrics["optim/param_norm"] = optax.tree.norm(learned)
        metrics["optim/lr"] = schedule(state["step"])
        return new, metrics

    return train_step


def init_state(task: Any, optimizer: Any, recipe: Any, rng: jax.Array) -> dict[str, Any]:
    """Random parameters and a fresh optimizer. Pure, so that it can be traced or jitted."""
    params = task.init(rng)
    learned, _ = optim.split(params, recipe.optim.trainable)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(learned),
    }
    if recipe.optim.ema:
        state["ema"] = jax.tree.map(jnp.copy, learned)
    return state


def state_shardings(mesh: Any, task: Any, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Where every leaf of the state lives; moments lie with their parameters."""
    params = sharding.of_params(mesh, task.sharding_rules, abstract["params"])
    flat = functional.flatten(params)
    rest = {key: value for key, value in abstract.items() if key != "params"}
    return {"params": params, **sharding.like_params(mesh, rest, flat)}


def fit(
    recipe: Any,
    task: Any,
    formatter: Any,
    workdir: pathlib.Path,
    *,
    mesh: Any,
    load_upstream: Callable[[str, Any], Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    step_fn: Callable = make_train_step,
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

    Raises:
      TrainingStopped: the loss is NaN or infinite, or a guard tripped.
      ConfigError, CheckpointError, DataError: see their modules.
    """
    config = recipe.train
    watch = guards.make(config.guards)
    evaluations = evaluate_lib.make(recipe.evals)
    optimizer = optim.make_optimizer(recipe.optim, config.steps)
    rng = jax.random.key(config.seed)

    def make_state():
        return init_state(task, optimizer, recipe, jax.random.fold_in(rng, 0))

    abstract = jax.eval_shape(make_state)
    shardings = state_shardings(mesh, task, abstract)
    rows = sharding.rows_of_process(mesh, config.batch_size)
    everywhere, by_rows = sharding.replicated(mesh), sharding.of_batch(mesh)
    last: dict[str, float] = {}

    with contextlib.ExitStack() as closing:  # last opened, first closed
        saver = closing.enter_context(
            checkpoints.Checkpointer(
                workdir, keep_last=config.keep_last, milestone_every=config.milestone_every
            )
        )
        start = saver.latest_good() or 0

        # Data are looked at before anything is compiled or allocated.
        batches = closing.enter_context(
            pipeline.make_batches(
                recipe.data,
                formatter,
                batch_size=config.batch_size,
                seed=config.seed,
                start_step=start,
                rows=rows,
            )
        )
        first = next(batches)
        getattr(task, "check_batch", lambda arrays: None)(first.arrays)
        evaluate_lib.check_all(evaluations, task, formatter, abstract["params"], config.seed)

        owes_evaluation = False
        if start:
            _say(f"resuming from step {start} of {config.steps} in {workdir}")
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
            )
            state, saved = saver.restore(start, target)
            owes_evaluation = not saved["data"]["evaluated"]
        else:
            state = jax.jit(make_state, out_shardings=shardings)()
            state["params"] = starting_point.lay_weights(
                recipe.init, task, state["params"], load_upstream
            )
            if recipe.optim.ema:
                learned, _ = optim.split(state["params"], recipe.optim.trainable)
                state["ema"] = jax.tree.map(jnp.copy, learned)
        _say(_describe(abstract, recipe, mesh))

        update = jax.jit(
            step_fn(task, optimizer, recipe),
            in_shardings=(shardings, by_rows, everywhere),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        )
        # Jitted, because device_put cannot reach the devices of other processes.
        step_rng = jax.jit(lambda: jax.random.fold_in(rng, 1), out_shardings=everywhere)()
        runner = evaluate_lib.Runner(task, formatter, mesh, shardings["params"], config.seed)
        if jax.process_index() == 0:
            closing.callback(curves.draw, workdir)
        writer = closing.enter_context(
            metric_writer.MetricWriter(
                workdir, start_step=start, tensorboard=config.tensorboard, wandb=config.wandb
            )
        )
        bar = closing.enter_context(contextlib.closing(_make_bar(task, first, start, config, mesh)))
        stop = stop_signal.StopSignal()
        closing.callback(stop.restore)

        def evaluate(step):
            params = _averaged(state, recipe)
            for evaluation in evaluations:
                every = evaluation.config.every
                if step == config.steps or (every and step % every == 0):
                    bar.pause()
                    results = runner(evaluation, params, workdir / "eval" / f"{step:08d}")
                    writer.write(step, results)
                    last.update(results)
                    _say("  ".join(f"{key}={value:.5g}" for key, value in results.items()))
                    bar.resume()

        def save(step, evaluated):
            position = {"step": step, "seed": config.seed, "evaluated": evaluated}
            saver.save(step, state, {**(meta or {}), "data": position})

        def settle(pending):
            """Looks at the metrics of an update that has been dispatched earlier."""
            step, metrics, batch = pending
            values = {key: float(x) for key, x in jax.device_get(metrics).items()}
            if not math.isfinite(values["loss"]):
                raise TrainingStopped(_explain_nonfinite(workdir, step, values, batch, rows))
            for problem in filter(None, [guard.check(step, values) for guard in watch]):
                raise TrainingStopped(
                    f"{problem.rstrip('.')}. Checkpoints of earlier steps are in {workdir}; after "
                    f"changing the recipe the same command continues from the newest"
                )
            if step == start + 1:
                bar.restart(step)  # until here it was compiled
            if step % config.log_every == 0 or step == config.steps:
                speed = bar.speed(step)
                writer.write(step, {**{f"train/{k}": v for k, v in values.items()}, **speed})
                bar.update(step, values["loss"], speed)
                last.update(values)

        if owes_evaluation:  # the run was asked to stop at a step that is evaluated
            evaluate(start)
        if watch:
            placed = sharding.place_batch(mesh, first.arrays, rows, config.batch_size)
            with partition.use_mesh(mesh):
                guards.check_metrics(watch, update.eval_shape(state, placed, step_rng)[1])
        if start >= config.steps:
            _say(f"step {start} of {config.steps} was already reached; nothing is left to train")
        pending, step = None, start
        for batch in itertools.chain([first], batches):
            if step >= config.steps:
                break
            placed = sharding.place_batch(mesh, batch.arrays, rows, config.batch_size)
            with partition.use_mesh(mesh):
                state, metrics = update(state, placed, step_rng)
            step += 1
            if pending:
                settle(pending)
            pending = (step, metrics, batch)
            saves = step == config.steps or (config.save_every and step % config.save_every == 0)
            evaluates = step == config.steps or any(
                e.config.every and step % e.config.every == 0 for e in evaluations
            )
            interrupted = stop.asked(step)
            if saves or evaluates or interrupted:
                settle(pending)  # nothing is saved or scored after a loss that is not finite
                pending = None
            # Evaluated before it is saved: a run killed in between loses no line of metrics.jsonl.
            # Someone who asks to stop is not kept waiting; the next run makes up for it.
            if evaluates and not interrupted:
                evaluate(step)
            if saves or interrupted:
                save(step, evaluated=not (evaluates and interrupted))
            if interrupted:
                _say(f"asked to stop: saved step {step}; the same command continues from there")
                break
            saver.check()
    return last


def _averaged(state: Mapping[str, Any], recipe: Any) -> Any:
    """The parameters to evaluate: the moving average where there is one."""
    if not recipe.optim.ema:
        return state["params"]
    _, frozen = optim.split(state["params"], recipe.optim.trainable)
    return optim.merge(state["ema"], frozen)


def _describe(abstract: Any, recipe: Any, mesh: Any) -> str:
    learned, frozen = optim.split(abstract["params"], recipe.optim.trainable)
    count = {
        k: sum(math.prod(x.shape) for x in v.values())
        for k, v in (("learned", learned), ("frozen", frozen))
    }
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"{count['learned']:,} parameters learn, {count['frozen']:,} are frozen; "
        f"state {size / 2**30:.2f} GiB over {mesh.size} {jax.devices()[0].device_kind} "
        f"({shape}), {jax.process_count()} processes"
    )


def _make_bar(task: Any, batch: Any, start: int, config: TrainConfig, mesh: Any) -> Any:
    shapes = {
        key: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
        for key, x in batch.arrays.items()
    }
    units = getattr(task, "units_per_step", lambda b: ("rows", float(config.batch_size)))(shapes)
    flops = getattr(task, "flops_per_step", lambda b: 0.0)(shapes)
    peak = hardware.peak_flops(jax.devices()[0])
    return progress.Progress(
        start=start,
        total=config.steps,
        units=units,
        flops_per_step=flops,
        peak_flops=peak * mesh.size if peak else None,
    )


def _explain_nonfinite(
    workdir: pathlib.Path, step: int, values: Mapping[str, float], batch: Any, rows: np.ndarray
) -> str:
    path = workdir / f"nonfinite_batch_{step}_process{jax.process_index()}.npz"
    np.savez(path, rows=rows, **batch.arrays)
    records = [record for row in batch.record_ids for record in row]
    shown = ", ".join(records[:8]) + (f", ... ({len(records)} in all)" if records[8:] else "")
    return (
        f"loss={values['loss']} at step {step} (grad_norm={values['optim/grad_norm']:.4g}). "
        f"Records of the batch: {shown}. The batch is saved in {path}. "
        f"The newest checkpoint is from before this step; lower optim.lr, set optim.clip_norm, "
        f"or remove the records, then run the same command again"
    )


def _say(message: str) -> None:
    if jax.process_index() == 0:
        print(f"[train] {message}", file=sys.stderr, flush=True)
