"""Everything that can be configured, read from the classes that read it.

    python -m vlm_jax.main --config=F --describe       one recipe: every key, its value, its meaning
    python -m vlm_jax.program.describe > docs/config.md        every section there is

A section of a config is read by one dataclass (or function); types and defaults come from its
fields, meanings from the `Attributes` (or `Args`) of its docstring.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_jax import task as task_lib
from vlm_jax.data import pipeline, sources
from vlm_jax.program import config as config_lib
from vlm_jax.program import evaluate, run

_WIDTH = 100
_MISSING = object()
_TARGETS = ("Attributes:", "Args:")
_MIXTURE = {
    "type": "of the source: one of sources.TYPES, a module of vlm_jax/datasets, or a dotted name",
    "weight": "share of the rows, relative to the other sources",
}
_TOP = "config"  # the section that holds the others
_PRESET = "published sizes, which the other keys change"


@dataclasses.dataclass(frozen=True)
class Row:
    """One key.

    Attributes:
      key: its name in the section.
      type: as annotated.
      default: as written in Python; "required" without one.
      meaning: a sentence or two.
      value: in a recipe; None where there is none.
    """

    key: str
    type: str
    default: str
    meaning: str
    value: str | None = None


@dataclasses.dataclass(frozen=True)
class Section:
    """What one class or function reads.

    Attributes:
      name: dotted, as on the command line.
      reader: dotted name of the class or function.
      summary: first sentence of its documentation.
      rows: its keys.
    """

    name: str
    reader: str
    summary: str
    rows: list[Row]


def text(config: Any) -> str:
    """Every key of a recipe, as it would be given on the command line.

    Raises:
      ConfigError: a section that its reader refuses.
    """
    blocks = []
    for section in sections(config_lib.plain(config)):
        prefix = "--config." if section.name == _TOP else f"--config.{section.name}."
        lines = [f"{section.name}    {section.reader}", f"    {section.summary}", ""]
        for row in section.rows:
            default = row.default if row.default == "required" else f"default {row.default}"
            lines.append(f"{prefix}{row.key}={row.value}    {row.type}, {default}")
            lines += textwrap.wrap(
                row.meaning, _WIDTH - 8, initial_indent=" " * 8, subsequent_indent=" " * 8
            )
        blocks.append("\n".join(lines))
    return "\n\n\n".join(blocks)


def sections(values: Mapping[str, Any]) -> Iterator[Section]:
    """The sections of one recipe, with its values."""
    hints = typing.get_type_hints(run.Recipe)
    parts = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    top = [row for row in rows_of(run.Recipe, values) if row.key in ("system", "path")]
    yield _section(_TOP, run.Recipe, top)
    system = task_lib.resolve(values["system"], "systems")
    task = system.make_task(dict(values["model"]), **values.get("task") or {})
    fixed = {"cfg"}
    if hasattr(task, "cfg"):  # a system from elsewhere may keep its model's fields itself
        yield from _of_model(task.cfg, values["model"], "model")
    rows = rows_of(type(task), values.get("task") or {}, task)
    yield _section("task", type(task), [row for row in rows if row.key not in fixed])
    fields = values.get("formatter") or {}
    formatter = config_lib.call(system.make_formatter, fields, "formatter")
    yield _section("formatter", type(formatter), rows_of(type(formatter), fields, formatter))
    for name, cls in parts.items():
        if name == "data":
            yield from _of_data(values[name], name)
        else:
            yield _section(name, cls, rows_of(cls, values.get(name) or {}))
    for name, entry in (values.get("evals") or {}).items():
        yield from _of_evaluation(entry, f"evals.{name}", task)
    if prepare := getattr(system, "prepare", None):
        given = values.get("prepare") or {}
        default = inspect.signature(prepare).parameters.get("of")
        for reader in _readers(prepare, given.get("of", default and default.default)):
            yield _section("prepare", reader, rows_of(reader, given))


def _of_model(cfg: Any, given: Mapping[str, Any], name: str) -> Iterator[Section]:
    rows, parts = [], []
    if "preset" in given:
        rows.append(Row("preset", "str", "''", _PRESET, repr(given["preset"])))
    for row in rows_of(type(cfg), given, cfg):
        part = getattr(cfg, row.key)
        if dataclasses.is_dataclass(part):
            parts += _of_model(part, given.get(row.key) or {}, f"{name}.{row.key}")
        else:
            rows.append(row)
    if rows:
        yield _section(name, type(cfg), rows)
    yield from parts


def _of_data(values: Mapping[str, Any], name: str) -> Iterator[Section]:
    rows = rows_of(pipeline.DataConfig, values)
    yield _section(name, pipeline.DataConfig, [row for row in rows if row.key != "mixture"])
    for key, entry in (values.get("mixture") or {}).items():
        yield from _of_source(entry, f"{name}.mixture.{key}")


def _of_source(values: Mapping[str, Any], name: str) -> Iterator[Section]:
    reader = source_reader(values["type"])
    own = {"type": repr(values["type"]), "weight": repr(values.get("weight", 1.0))}
    rows = [
        Row("type", "str", "required", _MIXTURE["type"], own["type"]),
        Row("weight", "float", "1.0", _MIXTURE["weight"], own["weight"]),
    ]
    nested = {key: x for key, x in values.items() if isinstance(x, Mapping) and "type" in x}
    rows += [row for row in rows_of(reader, values) if row.key not in nested]
    yield _section(name, reader, rows)
    for key, entry in nested.items():
        yield from _of_source(entry, f"{name}.{key}")


def _of_evaluation(values: Mapping[str, Any], name: str, task: Any) -> Iterator[Section]:
    evaluator = task_lib.resolve(values["type"], "evaluators").Evaluator
    rows = [
        row
        for row in rows_of(evaluate.EvalConfig, values)
        if row.key not in ("data", "formatter", "fields")
    ]
    yield _section(name, evaluator, [*rows, *rows_of(evaluator, values)])
    if values.get("formatter"):
        reader = task.prompt_formatter
        rows = [row for row in rows_of(reader, values["formatter"]) if row.key != "formatter"]
        yield _section(f"{name}.formatter", reader, rows)
    yield from _of_data(values["data"], f"{name}.data")


def source_reader(kind: str) -> Any:
    """The class that reads a source of this type."""
    if kind in sources.TYPES:
        return sources.TYPES[kind]
    module = importlib.import_module(kind if "." in kind else f"vlm_jax.datasets.{kind}")
    returned = typing.get_type_hints(module.make_source).get("return", module.make_source)
    return next(iter(typing.get_args(returned)), returned)  # the first of several


def rows_of(reader: Any, values: Mapping[str, Any] | None = None, made: Any = None) -> list[Row]:
    """Keys of a dataclass, or parameters of a function or class.

    Args:
      reader: what reads the section.
      values: of a recipe; None gives rows without values.
      made: an instance, whose attributes are the values where the recipe is silent.
    """
    known = list(_parameters(reader))
    meanings = documented(reader, [key for key, *_ in known])
    rows = []
    for key, kind, default in known:
        value = None
        if values is not None:
            fallback = getattr(made, key, default)
            value = "" if (x := values.get(key, fallback)) is _MISSING else repr(x)
        shown = "required" if default is _MISSING else repr(default)
        rows.append(Row(key, kind, shown, meanings.get(key, ""), value))
    return rows


def _parameters(reader: Any) -> Iterator[tuple[str, str, Any]]:
    """(name, type, default) of each key."""
    if dataclasses.is_dataclass(reader):
        for field in dataclasses.fields(reader):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if field.init:
                missing = default is dataclasses.MISSING
                kind = getattr(field.type, "__name__", str(field.type))
                yield field.name, kind, _MISSING if missing else default
        return
    for name, parameter in inspect.signature(reader).parameters.items():
        if name in ("self", "workdir") or parameter.kind is parameter.VAR_KEYWORD:
            continue
        missing = parameter.default is parameter.empty
        hint = "" if parameter.annotation is parameter.empty else str(parameter.annotation)
        yield name, hint, _MISSING if missing else parameter.default


def documented(reader: Any, keys: list[str]) -> dict[str, str]:
    """Meanings of keys, from `Attributes` or `Args` of the docstring (a class's or of __init__)."""
    texts = [reader.__doc__, getattr(getattr(reader, "__init__", None), "__doc__", None)]
    found: dict[str, str] = {}
    for content in filter(None, texts):
        for names, meaning in _entries(inspect.cleandoc(content)):
            found |= {key: meaning for key in names if key in keys and key not in found}
            # "epochs: passes. sentences: so many instead." says two things in one entry.
            for key in keys:
                head, mark, rest = meaning.partition(f". {key}: ")
                if mark and key not in found:
                    found[key] = rest
                    found |= {name: head + "." for name in names if name in keys}
    return found


def _entries(content: str) -> Iterator[tuple[list[str], str]]:
    """(names, meaning) of each entry below a heading of `_TARGETS`."""
    inside, names, lines = False, [], []
    for line in [*content.splitlines(), "end"]:
        entry = re.match(r"  (\w+(?:, \w+)*): (.*)", line) if inside else None
        if names and (entry or (line and not line.startswith("   "))):
            yield names, " ".join(lines)
            names, lines = [], []
        if line and not line.startswith(" "):
            inside = line in _TARGETS
        elif entry:
            names, lines = entry[1].split(", "), [entry[2]]
        elif names and line:
            lines.append(line.strip())


def _section(name: str, reader: Any, rows: list[Row]) -> Section:
    content = inspect.cleandoc(reader.__doc__ or "").partition("\n\n")[0]
    summary = " ".join(content.split())
    if summary in ("", "See the module."):
        module = importlib.import_module(reader.__module__)
        summary = " ".join(inspect.cleandoc(module.__doc__ or "").partition("\n\n")[0].split())
    return Section(name, f"{reader.__module__}.{reader.__qualname__}", summary, rows)


def page() -> str:
    """docs/config.md: every section, source, evaluator and system, as Markdown."""
    lines = [
        "# Configuration",
        "",
        "Every key of every section, with its type, default and meaning. Any of them can be given",
        "on the command line: `--config.train.steps=100`. A recipe with its own values:",
        "`python -m vlm_jax.main --config=F --describe`.",
        "",
        "<!-- Made by `python -m vlm_jax.program.describe > docs/config.md`; do not edit. -->",
    ]
    for title, found in _all_sections():
        lines += ["", f"## {title}"]
        for section in found:
            lines += ["", f"### {section.name}", "", f"{section.summary} `{section.reader}`"]
            if section.rows:
                lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"]
            for row in section.rows:
                cells = f"`{row.key}`", f"`{row.type}`", f"`{row.default}`", row.meaning
                lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _all_sections() -> Iterator[tuple[str, list[Section]]]:
    hints = typing.get_type_hints(run.Recipe)
    shared = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    shared["evals.NAME"] = evaluate.EvalConfig
    top = [row for row in rows_of(run.Recipe) if row.key not in shared]
    found = [_section(name, cls, rows_of(cls)) for name, cls in shared.items()]
    yield "Every recipe", [_section(_TOP, run.Recipe, top), *found]
    for name in task_lib.known("systems"):
        yield f"System {name}", list(_of_system(name))
    kinds = [*sorted(sources.TYPES), *task_lib.known("datasets")]
    kinds = [kind for kind in kinds if kind in sources.TYPES or _has(kind, "make_source")]
    readers = {kind: source_reader(kind) for kind in kinds}
    yield (
        "Sources of a mixture",
        [_section(f'type="{kind}"', reader, rows_of(reader)) for kind, reader in readers.items()],
    )
    evaluators = {
        kind: task_lib.resolve(kind, "evaluators").Evaluator
        for kind in task_lib.known("evaluators")
    }
    yield (
        "Evaluators",
        [_section(f'type="{kind}"', cls, rows_of(cls)) for kind, cls in evaluators.items()],
    )


def _of_system(name: str) -> Iterator[Section]:
    system = task_lib.resolve(name, "systems")
    cls = typing.get_type_hints(system.make_task)["return"]
    yield from _of_classes(typing.get_type_hints(cls)["cfg"], "model")
    yield _section("task", cls, [row for row in rows_of(cls) if row.key != "cfg"])
    formatter = system.make_formatter
    if not inspect.isclass(formatter):
        formatter = typing.get_type_hints(formatter)["return"]
    yield _section("formatter", formatter, rows_of(formatter))
    if reader := getattr(cls, "prompt_formatter", None):
        rows = [row for row in rows_of(reader) if row.key != "formatter"]
        yield _section("evals.NAME.formatter", reader, rows)
    if prepare := getattr(system, "prepare", None):
        kinds = {reader: kind for kind, reader in getattr(prepare, "readers", {}).items()}
        for reader in _readers(prepare):
            of = f', of="{kinds[reader]}"' if reader in kinds else ""
            yield _section(f"prepare{of}", reader, rows_of(reader))


def _readers(prepare: Any, of: str | None = None) -> list[Any]:
    """What reads the section `prepare`: the function, and those that it hands other keys on to.

    Args:
      prepare: of a system; `readers`, where it has them, are its kinds by name.
      of: which of them; None takes all.
    """
    kinds = getattr(prepare, "readers", {})
    return [prepare, *(reader for name, reader in kinds.items() if of in (None, name))]


def _of_classes(hint: Any, name: str) -> Iterator[Section]:
    """A model's dataclass, or each of a union, and those of its parts."""
    for cls in typing.get_args(hint) or (hint,):
        if not dataclasses.is_dataclass(cls):
            continue  # None: a part that may be left out
        hints = typing.get_type_hints(cls)
        of_key = {key: typing.get_args(hint) or (hint,) for key, hint in hints.items()}
        parts = {key for key, found in of_key.items() if any(map(dataclasses.is_dataclass, found))}
        rows = [row for row in rows_of(cls) if row.key not in parts]
        if rows:
            yield _section(name, cls, rows)
        for key in sorted(parts):
            yield from _of_classes(hints[key], f"{name}.{key}")


def _has(kind: str, name: str) -> bool:
    return hasattr(importlib.import_module(f"vlm_jax.datasets.{kind}"), name)


if __name__ == "__main__":
    print(page(), end="")
