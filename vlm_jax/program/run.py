"""One run of the program: recipe -> task, formatter, mesh -> train or evaluate.

Split from `main` so that flags are answered before jax is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax

from vlm_jax import checkpoints
from vlm_jax import task as task_lib
from vlm_jax.checkpoints import step_folders
from vlm_jax.data import pipeline, records
from vlm_jax.machines import hardware, peers, stop_signal
from vlm_jax.program import config as config_lib
from vlm_jax.program import (
    evaluate,
    evaluate_alone,
    optim,
    provenance,
    resume,
    scores,
    sharding,
    train,
    workdir_lock,
)
from vlm_jax.weights import errors as weights_errors

# Errors that are the user's to mend: the program prints their message without a trace.
USER_ERRORS = (
    config_lib.ConfigError,
    OSError,  # files that are not there, full disks; the message names the file
    checkpoints.CheckpointError,
    weights_errors.WeightsError,
    records.DataError,
    records.MissingExtraError,
    train.TrainingStopped,
    scores.EvaluationError,
    workdir_lock.WorkdirInUse,
    peers.PeerMissing,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The typed sections of a config.

    Attributes:
      system: module in `vlm_jax/systems`, or a dotted name.
      model, task, formatter: what goes to the system's `make_task` and `make_formatter`.
      data, optim, mesh, init, train: see the dataclass of each.
      evals: see `evaluate.EvalConfig`.
      prepare: what goes to the system's `prepare(workdir, **prepare)`; empty is off.
      path: the user's own data, in recipes that ask for it; their other sections refer to it.
    """

    system: str
    model: Mapping[str, Any]
    train: train.TrainConfig
    data: pipeline.DataConfig
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    formatter: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optim: optim.OptimConfig = optim.OptimConfig()
    mesh: sharding.MeshConfig = sharding.MeshConfig()
    init: checkpoints.InitConfig = checkpoints.InitConfig()
    evals: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prepare: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    path: str | None = None

    def __post_init__(self):
        if self.path == "":
            raise ValueError("path is empty: this recipe reads your own data, --config.path=FOLDER")


def read_recipe(config: Any, workdir: pathlib.Path) -> Recipe:
    """Typed sections of a ConfigDict; '{workdir}' in strings becomes the work directory.

    Raises:
      ConfigError: every unknown key, wrong type and missing key, by name.
    """
    values = config_lib.place(config_lib.plain(config), str(workdir))
    sections = {
        "train": train.TrainConfig,
        "data": pipeline.DataConfig,
        "optim": optim.OptimConfig,
        "mesh": sharding.MeshConfig,
        "init": checkpoints.InitConfig,
    }
    problems = []
    for name, cls in sections.items():
        try:
            values[name] = config_lib.section(cls, values.get(name), name)
        except config_lib.ConfigError as error:
            problems.append(str(error))
    if problems:
        raise config_lib.ConfigError("\n".join(problems))
    return config_lib.section(Recipe, values, "config")


def run(
    config: Any,
    workdir: pathlib.Path,
    *,
    mode: str = "train",
    stop: stop_signal.StopSignal | None = None,
    given: Collection[str] | None = None,
) -> dict[str, float]:
    """Does what `python -m vlm_jax.main` says; returns the last metrics.

    Args:
      config: the recipe, a ConfigDict.
      workdir: folder of the run; training holds its lock meanwhile.
      mode: "train" or "evaluate".
      stop: says when to save and stop; None is Ctrl-C and SIGTERM to this process.
      given: keys of the recipe given on the command line ("init.run"); None counts all as given.
    """
    workdir = workdir.expanduser().absolute()
    _check_workdir(workdir)
    recipe = read_recipe(config, workdir)
    hardware.require_devices()
    system = task_lib.resolve(recipe.system, "systems", ("make_task", "make_formatter"))
    try:
        task, formatter = _make(system, recipe)
        mesh = sharding.make_mesh(recipe.mesh)
        evaluate.make(recipe.evals)
        optim.make_schedule(recipe.optim, recipe.train.steps)
        abstract = jax.eval_shape(task.init, jax.random.key(0))
        optim.split(abstract, recipe.optim.trainable)
        sharding.match(task.sharding_rules, abstract)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from error
    _check_batches(recipe, mesh)
    subject = evaluate_alone.find(recipe, workdir, given) if mode == "evaluate" else None

    named = {"model": recipe.model, "task": recipe.task, "formatter": recipe.formatter}
    common = dict(
        mesh=mesh,
        load_upstream=getattr(system, "load_upstream", None),
        meta={
            "config": config_lib.plain(config),
            "files": resume.files_of(named),
            **provenance.collect(),
        },
        make=lambda other: _make(system, read_recipe(other, workdir)),
    )
    if subject:  # writes results only, so that a running workdir may be evaluated
        _prepare(system, recipe, workdir)
        return evaluate_alone.run(subject, recipe, task, formatter, workdir, **common)
    step_fn = getattr(system, "make_train_step", train.make_train_step)
    with _only_run(workdir):
        _prepare(system, recipe, workdir)
        getattr(task, "check_data", lambda *_: None)(recipe.data, formatter, "data")
        return train.fit(recipe, task, formatter, workdir, step_fn=step_fn, stop=stop, **common)


def _only_run(workdir: pathlib.Path) -> contextlib.AbstractContextManager:
    """The lock of the work directory; the other processes of a job hear when the first fails."""
    if jax.process_index() == 0:
        return workdir_lock.WorkdirLock(workdir)
    return contextlib.nullcontext()


def _check_workdir(workdir: pathlib.Path) -> None:
    if reason := step_folders.why_not_writable(workdir):
        raise config_lib.ConfigError(f"--workdir={workdir}: {reason}")
    if workdir.exists() and not workdir.is_dir():
        raise config_lib.ConfigError(f"--workdir={workdir} is a file, not a folder")


def _make(system: Any, recipe: Recipe) -> tuple[Any, Any]:
    """Task and formatter of a recipe."""
    task = system.make_task(dict(recipe.model), **recipe.task)
    return task, config_lib.call(system.make_formatter, recipe.formatter, "formatter")


def _prepare(system: Any, recipe: Recipe, workdir: pathlib.Path) -> None:
    """Input that a recipe makes itself; process 0 writes it, the others wait."""
    if recipe.prepare and jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        prepare = functools.partial(system.prepare, workdir)
        config_lib.call(prepare, recipe.prepare, "prepare")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("prepared")


def _check_batches(recipe: Recipe, mesh: Any) -> None:
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    config_lib.check_divides(
        "train.batch_size",
        recipe.train.batch_size,
        "mesh.data*mesh.fsdp*train.accumulate",
        shares * recipe.train.accumulate,
        "every device takes the same number of rows of every part",
    )
    for evaluation in evaluate.make(recipe.evals):
        config_lib.check_divides(
            f"evals.{evaluation.name}.batch_size",
            evaluation.config.batch_size,
            "mesh.data*mesh.fsdp",
            shares,
        )
