"""From an ml_collections config to typed sections, each read by exactly one dataclass.

An unknown key, a wrong type or an impossible value is a ConfigError that names the key, the
values and the nearest valid key, before anything expensive starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

POSITIVE = (math.ulp(0.0), math.inf)  # limits of `check_ranges`


_DTYPES = ("float32", "bfloat16", "float16", "float64")


class ConfigError(ValueError):
    """A recipe or an override that cannot work; the message says what to change."""


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' or '; known: ...'."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1, 0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known keys: {', '.join(known)}" if known else ""


def section(cls: type, values: Mapping[str, Any] | None, name: str) -> Any:
    """The dataclass `cls` from one section's keys, types checked.

    Raises:
      ConfigError: unknown or missing keys, wrong types; all of them in one message.
    """
    values = _mapping(values, name)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    problems = []
    for key, value in values.items():
        if key not in fields:
            problems.append(f"unknown key {name}.{key}{nearest(key, fields)}")
        elif not _fits(value, hints[key]):
            problems.append(_misfit(value, hints[key], f"{name}.{key}"))
        elif hints[key] is float:
            try:
                values[key] = float(value)
            except OverflowError:
                problems.append(f"{name}.{key} is an integer that no float holds")
    for key, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and key not in values:
            problems.append(f"missing key {name}.{key}")
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return cls(**values)
    except ValueError as error:  # a dataclass's own __post_init__ checks
        raise ConfigError(f"{name}: {error}") from error


def model_section(cls: type, presets: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """`config.model` as the dataclass `cls`: the fields of `preset`, then those given.

    Raises:
      ConfigError: unknown preset, or as `section`.
    """
    fields = plain(values)
    preset = fields.pop("preset", "")
    if not isinstance(preset, str):
        raise ConfigError(_misfit(preset, str, "model.preset"))
    if preset and preset not in presets:
        raise ConfigError(f"model.preset={preset!r}{nearest(preset, presets)}")
    _check_sizes(cls, fields, "model")
    base = dataclasses.asdict(presets[preset]) if preset else {}
    return section(cls, {**base, **fields}, "model")


def _check_sizes(cls: type, values: Mapping[str, Any], name: str) -> None:
    """Raises ConfigError for numbers and dtypes that no network has; types are checked later."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key.endswith("dtype") and isinstance(value, str) and value not in _DTYPES:
            raise ConfigError(f"{name}.{key}={value!r}{nearest(value, _DTYPES)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        # 0 stands for "as others say" where it is the default, and is no size elsewhere.
        least = int(isinstance(value, int) and defaults.get(key) != 0)
        if isinstance(defaults.get(key), float):
            least = 0
        if not least <= value < 2**31:
            raise ConfigError(f"{name}.{key}={value!r} must be between {least} and {2**31 - 1}")


def call(function: Callable[..., Any], values: Mapping[str, Any] | None, name: str) -> Any:
    """`function(**values)`, with unknown keys named like those of a section.

    Raises:
      ConfigError: a key that the function does not take.
    """
    values = _mapping(values, name)
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = [key for key, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY]
        problems = [
            f"unknown key {name}.{key}{nearest(key, known)}" for key in values if key not in known
        ]
        hints = _hints(function)
        problems += [
            _misfit(value, hints[key], f"{name}.{key}")
            for key, value in values.items()
            if key in known and key in hints and not _fits(value, hints[key])
        ]
        if problems:
            raise ConfigError("\n".join(problems))
    return function(**values)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError):  # annotations that cannot be resolved are no contract
        return {}


def _misfit(value: Any, hint: Any, name: str) -> str:
    needs = getattr(hint, "__name__", hint)
    return f"{name}={value!r} is {type(value).__name__}, needs {needs}"


def plain(values: Any) -> Any:
    """ConfigDicts as dicts, all the way down."""
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    return values


def _mapping(values: Any, name: str) -> dict[str, Any]:
    values = plain({} if values is None else values)
    if not isinstance(values, dict):
        raise ConfigError(f"{name}={values!r:.60} is not a section: it holds name=value pairs")
    return values


def place(values: Any, workdir: str) -> Any:
    """Nested values with '{workdir}' in strings replaced by the work directory."""
    if isinstance(values, str):
        return values.replace("{workdir}", workdir)
    if isinstance(values, Mapping):
        return {key: place(value, workdir) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(place(value, workdir) for value in values)
    return values


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any or isinstance(hint, str):
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    expected = origin or hint
    if expected in (tuple, list):
        return isinstance(value, (tuple, list))
    return not isinstance(expected, type) or isinstance(value, expected)


def check_ranges(values: Any, **ranges: tuple[float, float]) -> None:
    """Raises ValueError unless each named field is a finite number between its two limits.

    NaN and infinities are outside of every range, and so is what is no number. A limit of +-inf
    is none.
    """
    problems = []
    for name, (low, high) in ranges.items():
        value = values[name] if isinstance(values, Mapping) else getattr(values, name)
        if _fits(value, float) and low <= value <= high and abs(value) < math.inf:
            continue
        if (low, high) == POSITIVE:
            limits = "positive"
        else:
            least, most = (f"{int(x)}" if x % 1 == 0 else f"{x:g}" for x in (low, min(high, 2**63)))
            limits = f"at least {least}" if high == math.inf else f"between {least} and {most}"
        problems.append(f"{name}={value!r} must be {limits}")
    if problems:
        raise ValueError("; ".join(problems))


def check_regex(name: str, pattern: str) -> None:
    """Raises ValueError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is not a regular expression: {error}") from error


def check_divides(whole_name: str, whole: int, part_name: str, part: int, remedy: str = "") -> None:
    """Raises ConfigError unless `part` divides `whole`."""
    if part <= 0 or whole % part:
        raise ConfigError(
            f"{whole_name}={whole} is not divisible by {part_name}={part}"
            f"{'; ' + remedy if remedy else ''}"
        )


def upstream_parts(
    path: str, known: Sequence[str], *, whole: str, without: Sequence[str]
) -> dict[str, str]:
    """The files of an `init.upstream` "PART=FILE,PART=FILE", by part.

    Args:
      path: a path alone is one of `whole`.
      known: parts of the system.
      whole: the part that holds all of a released model. without: parts that it holds already.

    Raises:
      ConfigError: an unknown part, or one that `whole` holds beside it.
    """
    if "=" not in path:
        return {whole: path}
    parts = {}
    for item in path.split(","):
        name, _, file = item.strip().partition("=")
        if name not in known or not file:
            raise ConfigError(
                f"init.upstream={path!r}: {item!r} is not PART=FILE with a part of "
                f"{', '.join(known)}"
            )
        parts[name] = file
    for name in without:
        if whole in parts and name in parts:
            raise ConfigError(
                f"init.upstream={path!r}: {whole} holds the language model already; leave {name} "
                "out"
            )
    return parts
