"""Where training starts: random parameters, then what is laid over them.

In this order: the task's own pretrained parts, another run's parameters, released weights.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vlm_jax import checkpoints, optim, sharding
from vlm_jax import config as config_lib
from vlm_jax.nn import functional


def lay_weights(init: Any, task: Any, params: Any, load_upstream: Callable | None) -> Any:
    """`params` with other weights laid over them, each array placed where the old one lies.

    Args:
      init: `checkpoints.InitConfig`: `run` (a work directory of ours) is laid first, then
        `upstream` (released weights); `random` is a regex of what may stay random.
      task: of the system; its `pretrained()` parameters, if it has any, are laid before both.
      params: placed random parameters.
      load_upstream: the system's reader of released weights, or None.

    Raises:
      ConfigError: unknown parameters, other shapes, or parameters that would stay random without
        having been named.
    """
    layers = []
    if pretrained := getattr(task, "pretrained", dict)():
        layers.append(("the task's pretrained part", pretrained))
    if init.run:
        layers.append((f"init.run={init.run}", checkpoints.load_params(init.run)))
    if init.upstream:
        if load_upstream is None:
            raise config_lib.ConfigError(
                f"init.upstream={init.upstream}: this system reads no upstream weights"
            )
        layers.append((f"init.upstream={init.upstream}", load_upstream(init.upstream, task)))
    if not layers:
        return params
    flat, filled = functional.flatten(params), set()
    for source, tree in layers:
        for path, x in functional.flatten(tree).items():
            if path not in flat:
                raise config_lib.ConfigError(f"{source} has {path}, which the model has not")
            old = flat[path]
            if tuple(x.shape) != tuple(old.shape):
                raise config_lib.ConfigError(
                    f"{source}: {path} has shape {tuple(x.shape)}, the model needs {old.shape}"
                )
            host = np.asarray(x).astype(old.dtype)
            flat[path] = jax.make_array_from_callback(
                old.shape, old.sharding, lambda index, host=host: host[index]
            )
            filled.add(path)
    random = [path for path in flat if path not in filled]
    surprising = [path for path in random if not (init.random and re.search(init.random, path))]
    if surprising and (init.run or init.upstream):
        raise config_lib.ConfigError(
            f"{len(surprising)} parameters would stay random: {', '.join(surprising[:8])}; "
            f"name them in init.random if that is meant"
        )
    return functional.unflatten(flat)


def restore_params(
    recipe: Any, task: Any, workdir: pathlib.Path, mesh: Any, load_upstream: Callable | None
) -> tuple[Any, int]:
    """The parameters to evaluate and their step, without the optimizer's state.

    They come from the newest good checkpoint of the work directory (the moving average where the
    recipe has one); in a work directory without checkpoints, from what `init` names (step 0).

    Raises:
      ConfigError: there is neither a checkpoint nor an `init`.
    """
    rng = jax.random.fold_in(jax.random.key(recipe.train.seed), 0)
    abstract = jax.eval_shape(task.init, rng)
    shardings = sharding.of_params(mesh, task.sharding_rules, abstract)
    saver = checkpoints.Checkpointer(workdir)
    step = saver.latest_good()
    saver.close()
    if step is None:
        if not (recipe.init.run or recipe.init.upstream):
            raise config_lib.ConfigError(
                f"nothing to evaluate: no checkpoint in {workdir}, and neither init.run nor "
                f"init.upstream is set"
            )
        params = jax.jit(task.init, out_shardings=shardings)(rng)
        return lay_weights(recipe.init, task, params, load_upstream), 0
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    params = checkpoints.load_params(workdir, target)
    if recipe.optim.ema:
        learned, frozen = optim.split(target, recipe.optim.trainable)
        averaged = checkpoints.load_params(workdir, functional.unflatten(learned), item="ema")
        _, frozen = optim.split(params, recipe.optim.trainable)
        params = optim.merge(functional.flatten(averaged), frozen)
    return params, step
