"""Rule tables between our parameter trees and the tensors of other programs, checked both ways.

A rule says, for every parameter of ours whose path it matches, what the other side calls it and
how the values differ. A name with `{layer}` stands for one tensor per index of our leading axis
(layers are stacked for the scan).

    Rule(r"layers/mlp/(gate|up)/kernel",                      ours, a regex for the whole path
         r"model.layers.{layer}.mlp.\\1_proj.weight",          theirs, expanded like re.sub
         load=..., save=...)                                  theirs -> ours, ours -> theirs

The first rule that matches counts. The same table reads (`convert`) and writes (`revert`), so
reading what was written gives every bit back.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vlm_jax.machines import memory
from vlm_jax.nn import functional, lora
from vlm_jax.weights import errors

Tensors = Mapping[str, np.ndarray]
_MAX_SHOWN = 40
_MAX_NAME, _MAX_COMPARED = 200, 2000  # of names that may be meant


class ConversionError(errors.WeightsError):
    """Everything that does not fit between a checkpoint and a parameter tree.

    Attributes:
      errors: one line each, all of them; the message shows the first 40.
    """

    def __init__(self, source: str, errors: Sequence[str]):
        self.errors = tuple(errors)
        shown = [f"  - {error}" for error in self.errors[:_MAX_SHOWN]]
        if len(self.errors) > _MAX_SHOWN:
            shown.append(f"  ... and {len(self.errors) - _MAX_SHOWN} more")
        super().__init__("\n".join([f"{source}: {len(self.errors)} tensors do not fit:", *shown]))


def _reshape(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return x.reshape(shape)


def _same(x: np.ndarray) -> np.ndarray:
    return x


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one kind of parameter is named and laid out elsewhere.

    Attributes:
      ours: regex for our whole '/'-joined path.
      theirs: their name, a template for `re.Match.expand`, or a function of the match. `{layer}`
        in a template is the index on our axis 0.
      load: (their array, our shape without the layer axis) -> our array.
      save: our array (numpy, or traced to learn the shape) -> their array.
    """

    ours: str
    theirs: str | Callable[[re.Match], str]
    load: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] = _reshape
    save: Callable[[Any], Any] = _same

    def name_of(self, match: re.Match) -> str:
        """Their name for a matched path of ours, `{layer}` not yet filled in."""
        return self.theirs(match) if callable(self.theirs) else match.expand(self.theirs)


# Our own tree, as it is.
NATIVE_RULES = (Rule(r".*", r"\g<0>"),)


@dataclasses.dataclass(frozen=True)
class _Target:
    """One parameter of ours and the tensors that fill it."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    rule: Rule
    names: tuple[str, ...]  # one, or one per layer
    stacked: bool

    @property
    def item_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def their_shape(self) -> tuple[int, ...]:
        return jax.eval_shape(
            self.rule.save, jax.ShapeDtypeStruct(self.item_shape, self.dtype)
        ).shape


def _targets(abstract: Mapping[str, Any], rules: Iterable[Rule]) -> list[_Target]:
    rules, found, orphans = tuple(rules), [], []
    for path, leaf in functional.flatten(abstract).items():
        for rule in rules:
            if match := re.fullmatch(rule.ours, path):
                name = rule.name_of(match)
                stacked = "{layer}" in name
                layers = range(leaf.shape[0]) if stacked else (None,)
                names = tuple(name.replace("{layer}", str(layer)) for layer in layers)
                found.append(_Target(path, leaf.shape, leaf.dtype, rule, names, stacked))
                break
        else:
            orphans.append(path)
    if orphans and all(map(lora.is_addition, orphans)):
        raise ValueError(f"no rule for {orphans[0]}: merge LoRA into the kernels first, nn.lora")
    if orphans:
        raise ValueError(f"no rule for the parameters {orphans} among {[r.ours for r in rules]}")
    return found


def source_of(tensors: Tensors) -> str:
    """Where the tensors come from, for messages."""
    return getattr(tensors, "source", "checkpoint")


def ignored(tensors: Iterable[str], ignore: Sequence[str]) -> list[str]:
    """The names that match one of the `ignore` patterns as a whole."""
    return [name for name in tensors if any(re.fullmatch(pattern, name) for pattern in ignore)]


def convert(
    tensors: Tensors,
    rules: Iterable[Rule],
    abstract: Mapping[str, Any],
    ignore: Sequence[str] = (),
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fills a parameter tree from the tensors of another program.

    One tensor at a time is read, transposed and copied to its place, so the peak is the result
    and one parameter. Floats take the dtype that `abstract` asks for, if it can hold them.

    Args:
      tensors: name -> array, see `readers.read`; lazily loaded ones are read once.
      rules: the table; see the top of this file.
      abstract: our tree of `jax.ShapeDtypeStruct`. LoRA in it that no rule names is left out of
        the result: it starts anew beside released kernels.
      ignore: regexes for names that are knowingly not used.
      shardings: a tree like `abstract` of `jax.sharding.Sharding`. Each parameter is placed as
        soon as it is complete. None leaves numpy arrays.

    Returns:
      A nested dict like `abstract`.

    Raises:
      NotEnoughMemory: the result does not fit into the host's memory.
      ConversionError: unexplained, missing or wrongly shaped tensors, whole numbers where floats
        are needed, values that are not finite; all of them, by name.
    """
    rules = tuple(rules)
    abstract = _without_additions(abstract, rules)
    targets = _targets(abstract, rules)
    wanted = {name for target in targets for name in target.names}
    skipped = set(ignored(tensors, ignore)) - wanted
    unused = [name for name in tensors if name not in wanted and name not in skipped]
    missing = {name for name in wanted if name not in tensors}
    problems = [
        f"{name}: in the checkpoint, but no parameter takes it{_nearest(name, missing, i)}"
        for i, name in enumerate(unused)
    ]
    placed = functional.flatten(shardings) if shardings is not None else {}
    result = {}
    for target in targets:
        array, their_shape = None, target.their_shape
        for layer, name in enumerate(target.names):
            if name in missing:
                near = _nearest(name, unused, len(problems))
                problems.append(
                    f"{name}: missing from the checkpoint, {target.path} needs it{near}"
                )
                continue
            x = tensors[name]
            if x.shape != their_shape:
                problems.append(
                    f"{name}: has shape {x.shape}, but {target.path} needs {their_shape}"
                )
            elif problem := _misfit(x, target.dtype):
                problems.append(f"{name}: {problem}")
            elif not problems:
                if array is None:  # only now is it known that the file holds as much
                    if not result and shardings is None:
                        memory.require_for_loading(source_of(tensors), abstract)
                    array = np.empty(target.shape, target.dtype)
                array[layer if target.stacked else ...] = target.rule.load(x, target.item_shape)
        if problems:
            continue
        if target.path in placed:
            array = _place(array, placed[target.path])
        result[target.path] = array
    if problems:
        raise ConversionError(source_of(tensors), problems)
    return functional.unflatten(result)


def _without_additions(abstract, rules):
    """The tree without LoRA that other programs have no names for."""

    def named(path):
        return any(re.fullmatch(rule.ours, path) for rule in rules)

    flat = functional.flatten(abstract)
    kept = {path: x for path, x in flat.items() if not lora.is_addition(path) or named(path)}
    return functional.unflatten(kept)


def revert(params: Mapping[str, Any], rules: Iterable[Rule]) -> dict[str, Callable]:
    """The other side's tensors: name -> function returning the numpy array, layers unstacked."""
    arrays = functional.flatten(params)

    def loader(target, layer):
        def load():
            x = arrays[target.path]
            value = target.rule.save(np.asarray(x[layer] if target.stacked else x))
            return np.asarray(value, order="C")  # unlike ascontiguousarray it leaves scalars be

        return load

    return {
        name: loader(target, layer)
        for target in _targets(params, rules)
        for layer, name in enumerate(target.names)
    }


def reverted_shapes(params: Mapping[str, Any], rules: Iterable[Rule]) -> dict[str, tuple]:
    """name -> shape of what `revert` gives; works on an abstract tree."""
    return {name: target.their_shape for target in _targets(params, rules) for name in target.names}


def cast(x: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """The array in another dtype.

    Raises:
      WeightsError: values that are not finite there; the message names the tensor and the value.
    """
    if problem := _misfit(x, np.dtype(dtype)):
        raise errors.WeightsError(f"{name}: {problem}")
    return x.astype(dtype, copy=False)


def _misfit(x: np.ndarray, dtype: Any) -> str:
    """Why the array cannot be stored as floats of that dtype; "" where it can."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return ""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"holds {x.dtype}, whole numbers where floats are needed; is it quantised?"
    with np.errstate(over="ignore"):
        there = x.astype(dtype, copy=False)
    if _all_finite(there):
        return ""
    bad = ~np.isfinite(there)
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    value = f"{int(bad.sum())} of {x.size} values are"
    if np.isfinite(x[first]):
        return f"{value} too large for {np.dtype(dtype).name}, first {float(x[first]):g} at {first}"
    return f"{value} not finite, first {float(x[first]):g} at {first}"


def _all_finite(x: np.ndarray) -> bool:
    if x.dtype == ml_dtypes.bfloat16:  # its own isfinite is many times slower
        return not np.any((x.view(np.uint16) & 0x7F80) == 0x7F80)
    return bool(np.isfinite(x).all())


def _nearest(name: str, candidates: Iterable[str], shown: int) -> str:
    """A hint; only for errors that are shown and names of usual size: the comparison is slow."""
    usual = [other for other in candidates if len(other) < _MAX_NAME][:_MAX_COMPARED]
    close = (
        difflib.get_close_matches(name, usual, 2)
        if shown < _MAX_SHOWN and len(name) < _MAX_NAME
        else []
    )
    return f" (nearest: {', '.join(close)})" if close else ""


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
