"""One update and the state that it changes; `train.fit` repeats it.

The state is {"step", "params", "opt_state"} and, with averaging, "ema". The last two are flat,
path -> array, and know only the parameters that learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax.nn import functional
from vlm_jax.ops import losses
from vlm_jax.program import optim, sharding

if TYPE_CHECKING:
    from vlm_jax.program.run import Recipe


def make_train_step(task: Any, optimizer: optax.GradientTransformation, recipe: Recipe) -> Callable:
    """(state, batch, rng) -> (state, metrics). Metrics are of the parameters before the update."""
    settings = recipe.optim
    schedule = optim.make_schedule(settings, recipe.train.steps)
    loss_at = getattr(task, "loss_at", lambda *args, step: task.loss(*args))
    after_update = getattr(task, "after_update", None)
    parts, config = recipe.train.accumulate, recipe.train

    def train_step(state, batch, rng):
        learned, frozen = optim.split(state["params"], settings.trainable)
        rng = jax.random.fold_in(rng, state["step"])

        def terms_of(learned, piece, index):
            params = optim.merge(learned, frozen)
            key = jax.random.fold_in(rng, index)
            loss, metrics = loss_at(params, piece, key, step=state["step"])
            return losses.terms(loss), metrics

        def weights_of(piece, index):
            # Of data alone: all that the parameters do here is unused, and is not computed.
            return losses.weights(terms_of(learned, piece, index)[0])

        whole = None  # every part by itself
        if parts > 1 and config.accumulate_mean == "batch":
            whole = optim.accumulate(weights_of, batch, parts)

        def loss_and_grad(piece, index):
            def loss_fn(learned):
                terms, metrics = terms_of(learned, piece, index)
                loss = losses.divided(terms, losses.weights(terms) if whole is None else whole)
                metrics = {**losses.named(terms), **metrics}
                return loss, metrics if whole is not None else losses.means(metrics, parts)

            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(learned)
            return grads, {"loss": loss, **metrics}

        grads, metrics = optim.accumulate(loss_and_grad, batch, parts)
        metrics = losses.means(metrics, parts)
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
            new = after_update(new, batch, jax.random.fold_in(rng, parts))
        metrics["optim/grad_norm"] = optax.tree.norm(grads)
        metrics["optim/param_norm"] = optax.tree.norm(learned)
        metrics["optim/lr"] = schedule(state["step"])
        return new, metrics

    return train_step


def init_state(task: Any, optimizer: Any, recipe: Recipe, rng: jax.Array) -> dict[str, Any]:
    """Random parameters and a fresh optimizer. Pure, so that it can be traced or jitted."""
    params = task.init(rng)
    step = jnp.zeros((), jnp.int32)
    return {"step": step, "params": params, **fresh_optimizer(params, optimizer, recipe)}


def fresh_optimizer(params: Any, optimizer: Any, recipe: Recipe) -> dict[str, Any]:
    """What a state has besides its parameters: "opt_state" and, with averaging, "ema"."""
    learned, _ = optim.split(params, recipe.optim.trainable)
    fresh = {"opt_state": optimizer.init(learned)}
    if recipe.optim.ema:
        fresh["ema"] = start_average(params, recipe)
    return fresh


def start_average(params: Any, recipe: Recipe) -> dict[str, Any]:
    """The moving average before any update: a copy of what learns."""
    learned, _ = optim.split(params, recipe.optim.trainable)
    return jax.tree.map(jnp.copy, learned)


def state_shardings(mesh: Any, task: Any, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Where every leaf of the state lives; moments lie with their parameters."""
    params = sharding.of_params(mesh, task.sharding_rules, abstract["params"])
    flat = functional.flatten(params)
    rest = {key: value for key, value in abstract.items() if key != "params"}
    return {"params": params, **sharding.like_params(mesh, rest, flat)}


def averaged(state: Mapping[str, Any], recipe: Recipe) -> Any:
    """The parameters to evaluate: the moving average where there is one."""
    if not recipe.optim.ema:
        return state["params"]
    _, frozen = optim.split(state["params"], recipe.optim.trainable)
    return optim.merge(state["ema"], frozen)


def describe(abstract: Any, recipe: Recipe, mesh: Any) -> str:
    """A line about a state: how much learns, and what it takes on which devices."""
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
