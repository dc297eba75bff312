"""curves.png: the scalars of a run, from its metrics.jsonl.

What changes gets a small panel; baselines are dashed lines in the panel of what they are baselines
of; constants and single values stand in a table below. Drawn with matplotlib where it is installed,
else with Pillow, plainer.
"""

import contextlib
import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence

from vlm_jax.program import metric_writer

_FIRST = ("train/loss", "train/optim/lr", "train/optim/grad_norm")
_MAX_PANELS = 12
_MAX_ROWS = 36  # of the table
_COLUMNS = 3
_COLOR = "#1f77b4"
_DASHED = ("#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")

Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One scalar over the run.

    Attributes:
      name: of the scalar.
      points: (x, y), in order.
      baselines: name -> (x, y) of what it is compared with.
    """

    name: str
    points: Points
    baselines: Mapping[str, Points] = dataclasses.field(default_factory=dict)


def draw(workdir, baselines: Mapping[str, str] | None = None) -> pathlib.Path | None:
    """Draws `<workdir>/curves.png`; None when there is nothing to draw.

    A picture that cannot be written is reported on stderr and never ends a run.

    Args:
      workdir: of the run.
      baselines: scalar -> the scalar that it is a baseline of; see `evaluate.baselines`.
    """
    series = collect(workdir)
    if not series:
        return None
    return _save(*arrange(series, baselines or {}), pathlib.Path(workdir) / "curves.png", "step")


def draw_series(
    series: Mapping[str, Points], path: pathlib.Path, x_label: str = "step"
) -> pathlib.Path | None:
    """Draws {title: [(x, y), ...]}, a panel each; None, with a line on stderr, when it cannot."""
    return _save([Panel(name, points) for name, points in series.items()], [], path, x_label)


def collect(workdir) -> dict[str, list[tuple[int, float]]]:
    """{metric: [(step, value), ...]}, the loss first, then the rest."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in metric_writer.read(workdir):
        step = entry.pop("step")
        for name, value in entry.items():
            with contextlib.suppress(OverflowError):  # an integer that no float holds
                if isinstance(value, (int, float)) and math.isfinite(value):
                    series.setdefault(name, []).append((step, float(value)))

    def rank(name):
        if name in _FIRST:
            return _FIRST.index(name)
        # What was measured on held-out data, then the rest of training, speed last.
        return 10 + 10 * name.startswith("train/") + 20 * name.startswith("speed/")

    return {name: series[name] for name in sorted(series, key=rank)}


def arrange(
    series: Mapping[str, Points], baselines: Mapping[str, str]
) -> tuple[list[Panel], list[str]]:
    """Panels of what changes, and lines of a table of everything else.

    Args:
      series: of `collect`.
      baselines: see `draw`; those whose scalar is missing stand for themselves.
    """
    of: dict[str, dict[str, Points]] = {}
    for name, score in baselines.items():
        if name in series and score in series:
            of.setdefault(score, {})[name] = series[name]
    compared = {name for found in of.values() for name in found}
    panels, rows = [], []
    for name, points in series.items():
        if name in compared:
            continue
        beside = {_short(base, name): x for base, x in of.get(name, {}).items()}
        if len({y for _, y in points}) > 1 and len(panels) < _MAX_PANELS:
            panels.append(Panel(name, points, beside))
            continue
        values = [f"{points[-1][1]:<10.4g}", *(f"{b} {x[-1][1]:.4g}" for b, x in beside.items())]
        rows.append((name, "  ".join(values)))
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"{name:{width}}  {values}".rstrip() for name, values in rows]
    if len(lines) > _MAX_ROWS:
        more = f"and {len(lines) - _MAX_ROWS + 1} more in {metric_writer.FILE}"
        lines = [*lines[: _MAX_ROWS - 1], more]
    return panels, lines


def _short(baseline: str, score: str) -> str:
    """eval/x/unigram_perplexity beside eval/x/token_perplexity -> unigram."""
    name, scored = (full.rpartition("/")[2] for full in (baseline, score))
    while scored and not name.endswith(scored):
        scored = scored.partition("_")[2]
    return name.removesuffix(scored).rstrip("_") or name


def _save(panels, lines, path: pathlib.Path, x_label: str) -> pathlib.Path | None:
    try:
        try:
            _draw_matplotlib(panels, lines, path, x_label)
        except ImportError:
            _draw_pillow(panels, lines, path)
    except Exception as error:
        print(f"curves: {path} is not drawn: {error}", file=sys.stderr)
        return None
    return path


def _draw_matplotlib(panels, lines, path: pathlib.Path, x_label: str) -> None:
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    columns = min(_COLUMNS, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    heights = [2.8] * rows + ([0.3 + 0.17 * len(lines)] if lines else [])
    width = max(4.2 * columns, 8.4 if lines else 0)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        steps, values = zip(*panel.points, strict=True)
        axes.plot(steps, values, color=_COLOR, linewidth=1.2, marker="." if len(steps) < 30 else "")
        for color, (name, points) in zip(_DASHED * 9, panel.baselines.items()):
            ends, levels = zip(*_across(points, steps), strict=True)
            label = f"{name} {levels[-1]:.4g}"
            axes.plot(ends, levels, "--", color=color, linewidth=1.0, label=label)
        if panel.baselines:
            axes.legend(fontsize=7, frameon=False)
        axes.set_title(f"{panel.name}  (last {values[-1]:.4g})", fontsize=9, loc="left")
        axes.ticklabel_format(useOffset=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if index >= len(panels) - columns:
            axes.set_xlabel(x_label, fontsize=8)
    if lines:
        axes = figure.add_subplot(grid[-1, :])
        axes.axis("off")
        text = "\n".join(lines)
        axes.text(0, 1, text, va="top", fontsize=8, family="monospace", transform=axes.transAxes)
    figure.savefig(path, dpi=100)


def _across(points: Points, steps: Sequence[float]) -> Points:
    """A baseline over the whole panel where it is one level."""
    if len({y for _, y in points}) > 1:
        return points
    return [(steps[0], points[0][1]), (steps[-1], points[0][1])]


def _draw_pillow(panels, lines, path: pathlib.Path) -> None:
    from PIL import Image, ImageDraw

    width, height, left, top, bottom = 420, 280, 64, 28, 24
    columns = min(_COLUMNS, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    line_height = 14
    size = max(width * columns, 840 if lines else 0), height * rows + line_height * (len(lines) + 1)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for index, panel in enumerate(panels):
        x0 = width * (index % columns) + left
        y0 = height * (index // columns) + top
        x1, y1 = x0 + width - left - 16, y0 + height - top - bottom
        steps, values = zip(*panel.points, strict=True)
        beside = {name: _across(points, steps) for name, points in panel.baselines.items()}
        every = [*values, *(y for points in beside.values() for _, y in points)]
        low, high = min(every), max(every)

        def place(points, x0=x0, x1=x1, y0=y0, y1=y1, steps=steps, low=low, high=high):
            spans = (steps[-1] - steps[0] or 1, high - low or 1.0)
            return [
                (
                    x0 + (x1 - x0) * (step - steps[0]) / spans[0],
                    y1 - (y1 - y0) * (value - low) / spans[1],
                )
                for step, value in points
            ]

        pen.rectangle((x0, y0, x1, y1), outline="#cccccc")
        pen.line(place(panel.points), fill=_COLOR, width=2)
        for color, (name, points) in zip(_DASHED * 9, beside.items()):
            _dash(pen, place(points), color)
            x, y = place(points)[-1]
            pen.text((x - 110, y - 12), f"{name} {points[-1][1]:.4g}", fill=color)
        pen.text((x0, y0 - 18), f"{panel.name}  (last {values[-1]:.4g})", fill="black")
        pen.text((x0 - left + 6, y0), f"{high:.4g}", fill="#555555")
        pen.text((x0 - left + 6, y1 - 12), f"{low:.4g}", fill="#555555")
        pen.text((x0, y1 + 6), str(steps[0]), fill="#555555")
        pen.text((x1 - 40, y1 + 6), str(steps[-1]), fill="#555555")
    for number, line in enumerate(lines):
        pen.text((6, height * rows + line_height * number), line, fill="black")
    picture.save(path)


def _dash(pen, points: Points, color: str) -> None:
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        parts = max(1, int(math.hypot(x1 - x0, y1 - y0) / 6))
        for i in range(0, parts, 2):
            a, b = i / parts, min(1.0, (i + 1) / parts)
            ends = (x0 + (x1 - x0) * a, y0 + (y1 - y0) * a, x0 + (x1 - x0) * b, y0 + (y1 - y0) * b)
            pen.line(ends, fill=color, width=1)
