"""The contract between the program and a paper.

The program (`main`, `train`, `evaluate`) hears of a paper only through the Task it is handed.
A system is a module with

    make_task(model, **fields) -> Task             the accelerator's side
    make_formatter(**fields) -> Formatter          the host's side; picklable
    load_upstream(path, task) -> Params            released weights as (part of) our parameters
    prepare(workdir, **fields) -> None             optional: write input that a recipe makes itself
    from_run(task, formatter, params, **fields)    what `vlm_jax.load` makes of a run of ours,
    from_upstream(checkpoint, **fields)            and of released weights
    copy_dtype(dtype)                              optional: of a copy of the parameters that those
                                                   two make to compute with
    command_line                                   optional: module behind `vlm_jax.predict NAME`

`resolve("lvm", "systems")` is `vlm_jax.systems.lvm`; a dotted name is imported as it stands, so
a paper may live outside this repository. Datasets and evaluators resolve by the same rule; those
that one system uses live in `vlm_jax/systems/<system>/<kind>/` and are named alike.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pathlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

from vlm_jax import answer
from vlm_jax.program import config

Params = Mapping[str, Any]
Batch = Mapping[str, Any]
Key = Any
Array = Any


class Task(Protocol):
    """What one paper learns and predicts. Frozen; holds no arrays, does no I/O."""

    # Ordered (regex on the parameter's path, PartitionSpec); every parameter must match one.
    sharding_rules: Sequence[tuple[str, Any]]

    # Named jittable predictors (params, batch, rng, *, options). Evaluators ask for one by name;
    # all arrays have a batch axis. Options are fixed when it is compiled: `evals.X.options`.
    predict: Mapping[str, Callable[..., Mapping[str, Array]]]

    def init(self, rng: Key) -> Params:
        """Random parameters. Traced by `eval_shape`; must not touch the disk."""

    def loss(self, params: Params, batch: Batch, rng: Key) -> tuple[Any, dict[str, Any]]:
        """The loss over the *global* batch, and what is worth plotting.

        The loss is {name: `ops.losses.Term`}: sums, and the weights that they are divided by, so
        that parts of a batch with unequal counts give the loss and gradient of the whole. A scalar
        will do where every row counts alike. Metrics are scalars or Terms; terms of a loss are
        plotted as `loss/NAME` without being asked for.
        """


class OptionalTask(Protocol):
    """Members that a task may have besides; the program looks for them with `getattr`."""

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Raises ValueError when a host batch does not fit the model; called on the first one."""

    def check_data(self, data: Any, formatter: Formatter, name: str) -> None:
        """Raises ValueError when files do not fit the task; called before anything is trained.

        `data` is the `pipeline.DataConfig` of the run or of an evaluation, `name` its section.
        """

    def pretrained(self) -> Params:
        """Part of the parameters, read from disk: frozen networks that the loss needs.

        Fills in a fresh run what `init.run` and `init.upstream` have not.
        """

    def loss_at(
        self, params: Params, batch: Batch, rng: Key, *, step: Array
    ) -> tuple[Any, dict[str, Any]]:
        """`loss` of one update (int32, from 0): for losses that change while training."""

    def after_update(self, state: Mapping[str, Any], batch: Batch, rng: Key) -> Mapping[str, Any]:
        """What gradients cannot do, for example reviving codes: the state after an update.

        Called at the end of every jitted update with the new state (`step`, `params`, `opt_state`,
        and `ema` where there is one; the last two are flat, path -> array) and the whole batch.
        Must keep shapes, dtypes and all other entries, and depend on its arguments alone.
        """

    # As `sharding_rules`, of what `inference_params` gives.
    inference_rules: Sequence[tuple[str, Any]]

    def inference_params(self, params: Params) -> Params:
        """Layout and dtype for decoding; traced. The predictors take either layout.

        Made once where weights are evaluated by themselves. In training the predictors get the
        parameters that learn, so that no second copy of them is held.
        """

    def flops_per_step(self, batch: Mapping[str, Any]) -> float:
        """Model FLOPs of one update on this global batch of shapes (causal half counted)."""

    def units_per_step(self, batch: Mapping[str, Any]) -> tuple[str, float]:
        """What the progress bar counts, for example ("tokens", 4096.0)."""

    def prompt_formatter(self, formatter: Formatter, **fields: Any) -> Formatter:
        """Of evaluations that set `evals.X.formatter=fields`; `formatter` is that of the run."""

    def row_reader(self, formatter: Formatter) -> Reader:
        """Of the other evaluations, where the formatter of the run does not read outputs itself."""


class Formatter(Protocol):
    """Record -> example of fixed shapes -> batch; see the table on top of `format.py`."""

    def __call__(self, record: Mapping[str, Any], rng: Any) -> dict[str, Any]:
        """One record as numpy arrays whose shapes never depend on the record.

        "host", an `answer.Host`, stays on the host: the truth, and what people are shown. Only
        evaluations keep it.
        """


class Reader(Protocol):
    """The host's side of an evaluation: a formatter, or what `Task.row_reader` gives.

    `needs`, optional: names of the outputs that `read` reads; compared with what the predictor
    gives before the first step.
    """

    def read(self, outputs: Mapping[str, Any], hosts: list[answer.Host]) -> list[answer.Answer]:
        """What a predictor's outputs say, a row each."""

    def collate(
        self, arrays: Mapping[str, Any], hosts: list[answer.Host], *, truth: bool
    ) -> tuple[Mapping[str, Any], list[answer.Host]]:
        """Optional: a whole batch as the predictors want it, for example pictures as ids.

        `truth`: answers will be compared, so hosts must have theirs.
        """


def resolve(name: str, kind: str, members: Sequence[str] = ()) -> ModuleType:
    """The module called `name`: `vlm_jax.<kind>.<name>`, or a dotted name as it stands.

    Raises:
      ConfigError: there is no such module, and the message names the nearest one; or it lacks one
        of `members`.
    """
    module = _import(name, kind)
    if lacks := [member for member in members if not hasattr(module, member)]:
        raise config.ConfigError(
            f"the module {name!r} is no {kind[:-1]}: it has no {' and no '.join(lacks)}"
        )
    return module


def _import(name: str, kind: str) -> ModuleType:
    full = name if "." in name.lstrip(".") else f"{_home(name, kind)}.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name is None or not (full == error.name or full.startswith(error.name + ".")):
            raise  # the module exists; something that it needs does not
        near = difflib.get_close_matches(name, known(kind), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise config.ConfigError(
            f"there is no {kind[:-1]} called {name!r}; {hint}known: {', '.join(known(kind))}"
        ) from None


def known(kind: str) -> list[str]:
    """Names of the modules of this kind, for example of all systems."""
    return sorted(_homes(kind))


def _home(name: str, kind: str) -> str:
    return _homes(kind).get(name, f"vlm_jax.{kind}")


@functools.cache
def _homes(kind: str) -> dict[str, str]:
    """Module -> its package: vlm_jax/<kind>, or vlm_jax/systems/<system>/<kind>, found on disk.

    Raises:
      ConfigError: two systems have one of the same name.
    """
    root = pathlib.Path(__file__).parent
    folders = {f"vlm_jax.{kind}": root / kind} | {
        f"vlm_jax.systems.{folder.parent.name}.{kind}": folder
        for folder in sorted(root.glob(f"systems/*/{kind}"))
    }
    homes: dict[str, str] = {}
    for package, folder in folders.items():
        for module in pkgutil.iter_modules([str(folder)]):
            if homes.setdefault(module.name, package) != package:
                raise config.ConfigError(
                    f"both {homes[module.name]} and {package} have {module.name!r}"
                )
    return homes
