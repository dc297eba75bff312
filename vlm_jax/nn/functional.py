"""The boundary between Flax NNX modules and plain nested dicts of arrays.

Inside it a network is an ordinary NNX object. Outside it (trainer, checkpoints, sharding, weight
conversion, freezing) parameters are a nested dict whose paths join with '/', for example
`layers/attn/q/kernel`. Lists of modules become dicts with the keys "0", "1", ...
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

Params = Mapping[str, Any]


class Functional:
    """A module constructor seen as pure functions over its parameters.

    Args:
      make: builds the module from `nnx.Rngs`. Every variable it holds must be an `nnx.Param`;
        randomness and caches are passed explicitly in this code base.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make

    @functools.cached_property
    def _abstract(self) -> tuple[nnx.GraphDef, nnx.State]:
        module = nnx.eval_shape(lambda: self._make(nnx.Rngs(0)))
        return nnx.split(module)

    def init(self, rng: jax.Array) -> Params:
        """Random parameters; a pure function of the key, so it can be traced or jitted."""
        return _plain(nnx.split(self._make(nnx.Rngs(rng)))[1])

    def abstract(self) -> Params:
        """The parameters as `jax.ShapeDtypeStruct`, without allocating anything."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def bind(self, params: Params) -> nnx.Module:
        """The module over these arrays. Cheap: dictionary work at trace time only."""
        graph, state = self._abstract
        flat = {path: array for path, array in _walk(params)}
        values = {}
        for path, variable in nnx.to_flat_state(state):
            values[path] = variable.replace(flat[tuple(str(part) for part in path)])
        return nnx.merge(graph, nnx.from_flat_state(values))


def _plain(state: nnx.State) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = variable.get_value()
    return tree


def _walk(tree: Any, prefix: tuple[str, ...] = ()):
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _walk(child, (*prefix, str(key)))
    else:
        yield prefix, tree


def flatten(tree: Params) -> dict[str, Any]:
    """{'a': {'b': x}} -> {'a/b': x}."""
    return {"/".join(path): leaf for path, leaf in _walk(tree)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b': x} -> {'a': {'b': x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = leaf
    return tree
