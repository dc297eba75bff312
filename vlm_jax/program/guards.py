"""Guards: limits on the metrics of training that stop a run with a reason.

Every run is guarded against a loss, a gradient or parameters that are not finite (`not_finite`).
Others are set by the recipe:

    c.train.guards = dict(
        codes=dict(metric="batch_code_perplexity", min=50.0, after=2_000, patience=500,
                   reason="the codebook collapses; raise task.entropy_weight"),
    )

A guard trips when its metric lay beyond its limit in `patience` consecutive updates, counted from
the update number `after`. NaN lies beyond every limit. The count is of the process, not of the
run: one that was continued from a checkpoint counts anew, and so trips at most `patience` updates
later than the uninterrupted one would have.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from vlm_jax.program import config as config_lib


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """One entry of `config.train.guards`.

    Attributes:
      metric: a metric of the update, without "train/" before its name.
      min, max: the limits; None is none.
      after: the update that is looked at first.
      patience: consecutive updates beyond the limit until the run stops.
      reason: what it means and what to do, for the message.
    """

    metric: str
    min: float | None = None
    max: float | None = None
    after: int = 1
    patience: int = 100
    reason: str = ""

    def __post_init__(self):
        if self.min is None and self.max is None:
            raise ValueError("neither min nor max is set; nothing would be guarded")
        given = {k: v for k in ("min", "max") if (v := getattr(self, k)) is not None}
        config_lib.check_ranges(given, **dict.fromkeys(given, (-math.inf, math.inf)))
        config_lib.check_ranges(self, patience=(1, math.inf), after=(0, math.inf))


@dataclasses.dataclass
class Guard:
    """A limit and how long it has been passed."""

    name: str
    config: GuardConfig
    beyond: int = 0

    def check(self, step: int, values: Mapping[str, float]) -> str:
        """What went wrong, or ""; called once for every update, in order."""
        config, value = self.config, values[self.config.metric]
        if step < config.after:
            return ""
        low = config.min is not None and not value >= config.min
        high = config.max is not None and not value <= config.max
        self.beyond = self.beyond + 1 if low or high else 0
        if self.beyond < config.patience:
            return ""
        side, limit = ("under min", config.min) if low else ("over max", config.max)
        times = f"{self.beyond} updates in a row" if self.beyond > 1 else "one update"
        value = f"{value:.6g}" if math.isfinite(value) else str(value)
        return (
            f"guard {self.name!r}: {config.metric}={value} at step {step}, {side}={limit:.6g} for "
            f"{times}{'. ' + config.reason if config.reason else ''}"
        )


def make(configs: Mapping[str, Mapping[str, Any]]) -> list[Guard]:
    """Guards from `config.train.guards`.

    Raises:
      ConfigError: unknown keys, no metric, no limit.
    """
    return [
        Guard(name, config_lib.section(GuardConfig, values, f"train.guards.{name}"))
        for name, values in (configs or {}).items()
    ]


def not_finite(values: Mapping[str, float]) -> str:
    """The first of the metrics that a sound update has finite and this one has not; "" if none.

    Norms stand for all gradients and all learned parameters. They overflow long before the values
    do: parameters of 1e30 are finite, and nothing that can be trained any more.
    """
    watched = ("loss", "optim/grad_norm", "optim/param_norm")
    return next((name for name in watched if not math.isfinite(values.get(name, 0.0))), "")


def keep_batch(workdir: pathlib.Path, step: int, batch: Any, rows: np.ndarray) -> str:
    """Saves a process's part of a batch that an update could not use, and names its records."""
    path = workdir / f"nonfinite_batch_{step}_process{jax.process_index()}.npz"
    np.savez(path, rows=rows, **batch.arrays)
    records = [record for row in batch.record_ids for record in row]
    shown = ", ".join(records[:8]) + (f", ... ({len(records)} in all)" if records[8:] else "")
    return f"Records of the batch: {shown}. The batch is saved in {path}"


def check_metrics(guards: Iterable[Guard], metrics: Iterable[str]) -> None:
    """Raises ConfigError for a guard on a metric that the update does not report."""
    known = set(metrics)
    for guard in guards:
        if guard.config.metric not in known:
            raise config_lib.ConfigError(
                f"train.guards.{guard.name}.metric={guard.config.metric!r}"
                f"{config_lib.nearest(guard.config.metric, known)}"
            )
