"""Where training starts, and what an evaluation is of.

A parameter comes from the first of these that has it: another run (`init.run`), released weights
(`init.upstream`), the task's own pretrained parts, chance. What came from where is said.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vlm_jax import checkpoints, saving
from vlm_jax.nn import functional
from vlm_jax.program import config as config_lib
from vlm_jax.program import resume, sharding

_RANDOM = "random"


def lay_weights(
    init: Any,
    task: Any,
    params: Any,
    load_upstream: Callable | None,
    compare: Callable[[str, Mapping[str, Any]], None] = lambda name, config: None,
) -> Any:
    """`params` with other weights laid over them, each array placed where the old one lies.

    Says on stderr, for every group of parameters, where it comes from.

    Args:
      init: `checkpoints.InitConfig`. What `run` (a work directory of ours) has comes from there;
        `upstream` (released weights) is read only when parameters are left; `random` is a regex of
        what may stay random.
      task: of the system; its `pretrained()` parameters, if it has any, come after both.
      params: placed random parameters.
      load_upstream: the system's reader of released weights, or None.
      compare: is given the name and the recipe of `run`, and raises where it is another function;
        see `comparison`.

    Raises:
      ConfigError: unknown parameters, other shapes, or parameters that would stay random without
        having been named.
    """
    flat = functional.flatten(params)
    sources: dict[str, str] = {}
    for source, tree in _layers(
        init, task, load_upstream, lambda: len(sources) == len(flat), compare
    ):
        for path, x in functional.flatten(tree).items():
            if path not in flat:
                raise config_lib.ConfigError(f"{source} has {path}, which the model has not")
            old = flat[path]
            if tuple(x.shape) != tuple(old.shape):
                raise config_lib.ConfigError(
                    f"{source}: {path} has shape {tuple(x.shape)}, the model needs {old.shape}"
                )
            if path in sources:
                continue
            host = np.asarray(x).astype(old.dtype)
            flat[path] = jax.make_array_from_callback(
                old.shape, old.sharding, lambda index, host=host: host[index]
            )
            sources[path] = source
    random = [path for path in flat if path not in sources]
    surprising = [path for path in random if not (init.random and re.search(init.random, path))]
    if surprising and (init.run or init.upstream):
        raise config_lib.ConfigError(
            f"{len(surprising)} parameters would stay random: {', '.join(surprising[:8])}; "
            f"name them in init.random if that is meant"
        )
    for line in describe({path: sources.get(path, _RANDOM) for path in flat}, flat):
        _say(line)
    return functional.unflatten(flat)


def comparison(
    init: Any, config: Mapping[str, Any] | None, make: Callable | None
) -> Callable[[str, Mapping[str, Any]], None]:
    """`compare` of `lay_weights`: refuses a model of the same shapes that is another function.

    Args:
      init: `checkpoints.InitConfig`; `insist` lets everything pass.
      config: of this run; None compares nothing.
      make: config -> (task, formatter).
    """

    def compare(name: str, theirs: Mapping[str, Any]) -> None:
        if config and make and not init.insist:
            resume.refuse(
                resume.changed_function(theirs, config, make),
                name,
                "The same parameters would compute another function: set the values there.",
            )

    return compare


def describe(sources: Mapping[str, str], flat: Mapping[str, Any]) -> list[str]:
    """A line per group of parameters: "vision: 148 tensors (85,000,000 numbers) from X".

    Args:
      sources: path -> where it comes from; a group is the first part of the path.
      flat: path -> anything with a shape.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for path, source in sources.items():
        groups.setdefault(path.split("/")[0], {}).setdefault(source, []).append(path)
    lines = []
    for group, by_source in groups.items():
        parts = []
        for source, paths in by_source.items():
            numbers = sum(math.prod(flat[path].shape) for path in paths)
            origin = source if source == _RANDOM else f"from {source}"
            parts.append(f"{len(paths)} tensors ({numbers:,} numbers) {origin}")
        lines.append(f"{group}: {', '.join(parts)}")
    return lines


def _layers(
    init: Any,
    task: Any,
    load_upstream: Callable | None,
    is_complete: Callable[[], bool],
    compare: Callable[[str, Mapping[str, Any]], None],
) -> Iterator[tuple[str, Any]]:
    """(name, parameters), the most binding first; later ones are read only when needed."""
    if init.run and saving.is_saved(init.run):
        config = saving.read_config(init.run)
        name = f"init.run={init.run} ({saving.source_of(config)})"
        compare(name, config)
        yield name, saving.read_params(init.run)
    elif init.run:
        step = checkpoints.find(init.run)
        averaged = init.averaged and step.has_average
        name = f"init.run={init.run} (step {step.number}{', moving average' if averaged else ''})"
        compare(name, step.meta.get("config") or {})
        yield name, checkpoints.load_params(step, averaged=init.averaged)
    if init.upstream:
        if load_upstream is None:
            raise config_lib.ConfigError(
                f"init.upstream={init.upstream}: this system reads no upstream weights"
            )
        if is_complete():
            _say(f"init.upstream={init.upstream} is not read: init.run has every parameter")
        else:
            yield f"init.upstream={init.upstream}", load_upstream(init.upstream, task)
    if not is_complete() and (pretrained := getattr(task, "pretrained", dict)()):
        yield "the task's pretrained part", pretrained


def params_of_run(step: checkpoints.Step, task: Any, mesh: Any, averaged: bool = True) -> Any:
    """The parameters of a checkpoint, placed on the mesh, without the optimizer's state.

    Raises:
      CheckpointError: they are of another model.
    """
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    shardings = sharding.of_params(mesh, task.sharding_rules, abstract)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    return checkpoints.load_params(step, target, averaged=averaged)


def params_of_init(
    recipe: Any, task: Any, mesh: Any, load_upstream: Callable | None, compare: Callable
) -> Any:
    """The parameters that a training run of this recipe would start from, placed on the mesh."""
    rng = jax.random.fold_in(jax.random.key(recipe.train.seed), 0)
    shardings = sharding.of_params(mesh, task.sharding_rules, jax.eval_shape(task.init, rng))
    params = jax.jit(task.init, out_shardings=shardings)(rng)
    return lay_weights(recipe.init, task, params, load_upstream, compare)


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(f"[start] {line}", file=sys.stderr, flush=True)
