"""Where training starts: random parameters, another run's, or released weights, in that order."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vlm_jax import checkpoints
from vlm_jax import config as config_lib
from vlm_jax.nn import functional


def lay_weights(init: Any, task: Any, params: Any, load_upstream: Callable | None) -> Any:
    """`params` with other weights laid over them, each array placed where the old one lies.

    Args:
      init: `checkpoints.InitConfig`: `run` (a work directory of ours) is laid first, then
        `upstream` (released weights); `random` is a regex of what may stay random.
      task: of the system.
      params: placed random parameters.
      load_upstream: the system's reader of released weights, or None.

    Raises:
      ConfigError: unknown parameters, other shapes, or parameters that would stay random without
        having been named.
    """
    layers = []
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
    if surprising:
        raise config_lib.ConfigError(
            f"{len(surprising)} parameters would stay random: {', '.join(surprising[:8])}; "
            f"name them in init.random if that is meant"
        )
    return functional.unflatten(flat)
