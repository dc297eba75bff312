"""Optimizers over selected parameters: schedules, AdamW, clipping, selectors by path.

What is trained, what decays and at which rate are regular expressions over parameter paths
('layers/attn/q/kernel'). Parameters that are not trained get neither gradients nor moments.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax.nn import functional
from vlm_jax.program import config as config_lib


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with a warm-up and a schedule.

    Attributes:
      lr: peak learning rate.
      end_lr: learning rate after the last decay step.
      schedule: "cosine", "linear" or "constant", after a linear warm-up from 0. The first update
        has learning rate 0 when there is a warm-up, as in the LVM reference.
      warmup_steps: updates.
      decay_steps: updates until `end_lr`, the warm-up included; 0 means all of `train.steps`.
      b1, b2, eps: of Adam.
      weight_decay: decoupled (multiplied by the learning rate).
      decay: regex of the parameters that decay. LVM decays everything, norms included.
      clip_norm: bound on the global gradient norm; 0 is off.
      trainable: regex of the parameters that learn.
      lr_scale: factor on the learning rate by regex; the first match counts.
      ema: decay of an exponential moving average of the trained parameters; 0 is off.
      moment_dtype: dtype of the first moment.
    """

    lr: float = 1e-3
    end_lr: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: str = ".*"
    clip_norm: float = 1.0
    trainable: str = ".*"
    lr_scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ema: float = 0.0
    moment_dtype: str = "float32"

    def __post_init__(self):
        not_negative, below_1 = (0, math.inf), (0, math.nextafter(1.0, 0.0))
        amounts = ("lr", "end_lr", "warmup_steps", "decay_steps", "weight_decay", "clip_norm")
        config_lib.check_ranges(
            self,
            **dict.fromkeys(amounts, not_negative),
            **dict.fromkeys(("b1", "b2", "ema"), below_1),
            eps=config_lib.POSITIVE,
        )
        config_lib.check_ranges(self.lr_scale, **dict.fromkeys(self.lr_scale, not_negative))
        for name in ("decay", "trainable"):
            config_lib.check_regex(name, getattr(self, name))
        for pattern in self.lr_scale:
            config_lib.check_regex("lr_scale key", pattern)
        if self.moment_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"moment_dtype={self.moment_dtype!r} is none of float32, bfloat16, float16"
            )


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Update count -> learning rate.

    Raises:
      ConfigError: unknown schedule, or a warm-up longer than the decay.
    """
    decay_steps = config.decay_steps or total_steps
    if config.warmup_steps > decay_steps:
        whole = (
            f"optim.decay_steps={decay_steps}, which counts the warm-up"
            if config.decay_steps
            else f"train.steps={decay_steps}, and optim.decay_steps=0 takes all of these"
        )
        raise config_lib.ConfigError(
            f"optim.warmup_steps={config.warmup_steps} is longer than {whole}: set "
            f"optim.warmup_steps to at most {decay_steps} too"
        )
    rest = max(decay_steps - config.warmup_steps, 1)
    shapes = {
        "constant": lambda: optax.constant_schedule(config.lr),
        "linear": lambda: optax.linear_schedule(config.lr, config.end_lr, rest),
        "cosine": lambda: optax.cosine_decay_schedule(
            config.lr, rest, alpha=config.end_lr / config.lr if config.lr else 0.0
        ),
    }
    if config.schedule not in shapes:
        raise config_lib.ConfigError(
            f"optim.schedule={config.schedule!r} is none of {', '.join(shapes)}"
        )
    if not config.warmup_steps:
        return shapes[config.schedule]()
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, shapes[config.schedule]()], [config.warmup_steps])


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimizer over a flat {path: array} dict of trained parameters."""

    def decays(params):
        return {path: bool(re.search(config.decay, path)) for path in params}

    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += [
        optax.scale_by_adam(
            b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.moment_dtype
        )
    ]
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    if config.lr_scale:
        parts.append(_scale_by_path(config.lr_scale))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, total_steps)))
    return optax.chain(*parts)


def _scale_by_path(scales: Mapping[str, float]) -> optax.GradientTransformation:
    def factor(path):
        return next((value for regex, value in scales.items() if re.search(regex, path)), 1.0)

    return optax.stateless(
        lambda updates, params: {path: x * factor(path) for path, x in updates.items()}
    )


def split(params: functional.Params, trainable: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(learned, frozen) as flat dicts; dictionary work, free inside jit.

    Raises:
      ConfigError: the regex matches no parameter.
    """
    flat = functional.flatten(params)
    learned = {path: x for path, x in flat.items() if re.search(trainable, path)}
    if not learned:
        raise config_lib.ConfigError(
            f"optim.trainable={trainable!r} matches none of {len(flat)} parameters, "
            f"for example {next(iter(flat), '(none)')!r}"
        )
    return learned, {path: x for path, x in flat.items() if path not in learned}


def merge(learned: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `split`."""
    return functional.unflatten({**frozen, **learned})


def accumulate(loss_and_grad, batch: Any, parts: int):
    """Mean of a function's outputs over `parts` equal pieces of the batch, one at a time.

    Piece j takes the rows j, j + parts, ..., so that every device works on every piece.

    Args:
      loss_and_grad: (piece, j) -> pytree of float arrays.
      batch: pytree of arrays [B, ...] with B divisible by `parts`.
      parts: number of pieces.
    """
    if parts == 1:
        return loss_and_grad(batch, 0)
    pieces = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )

    def body(total, scanned):
        piece, index = scanned
        return jax.tree.map(jnp.add, total, loss_and_grad(piece, index)), None

    shapes = jax.eval_shape(loss_and_grad, jax.tree.map(lambda x: x[0], pieces), 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (pieces, jnp.arange(parts)))
    return jax.tree.map(lambda x: x / parts, total)
