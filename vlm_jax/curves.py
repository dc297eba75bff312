"""curves.png: the scalars of a run, one small panel each, from its metrics.jsonl.

Drawn with matplotlib where it is installed, else with Pillow, plainer.
"""

import math
import pathlib
import sys

from vlm_jax import metric_writer

_FIRST = ("train/loss", "train/optim/lr", "train/optim/grad_norm")
_MAX_PANELS = 12
_COLUMNS = 3
_COLOR = "#1f77b4"


def draw(workdir) -> pathlib.Path | None:
    """Draws `<workdir>/curves.png`; None when there is nothing to draw.

    A picture that cannot be written is reported on stderr and never ends a run.
    """
    series = collect(workdir)
    return draw_series(series, pathlib.Path(workdir) / "curves.png") if series else None


def draw_series(series, path: pathlib.Path, x_label: str = "step") -> pathlib.Path | None:
    """Draws {title: [(x, y), ...]}, a panel each; None, with a line on stderr, when it cannot."""
    try:
        try:
            _draw_matplotlib(series, path, x_label)
        except ImportError:
            _draw_pillow(series, path)
    except Exception as error:
        print(f"curves: {path} is not drawn: {error}", file=sys.stderr)
        return None
    return path


def collect(workdir) -> dict[str, list[tuple[int, float]]]:
    """{metric: [(step, value), ...]}, the loss first, then the rest, at most twelve."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in metric_writer.read(workdir):
        step = entry.pop("step")
        for name, value in entry.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, []).append((step, float(value)))

    def rank(name):
        if name in _FIRST:
            return _FIRST.index(name)
        # What was measured on held-out data, then the rest of training, speed last.
        return 10 + 10 * name.startswith("train/") + 20 * name.startswith("speed/")

    return {name: series[name] for name in sorted(series, key=rank)[:_MAX_PANELS]}


def _draw_matplotlib(series, path: pathlib.Path, x_label: str) -> None:
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    columns = min(_COLUMNS, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    for index, (name, points) in enumerate(series.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=_COLOR, linewidth=1.2, marker="." if len(steps) < 30 else "")
        axes.set_title(f"{name}  (last {values[-1]:.4g})", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if index >= len(series) - columns:
            axes.set_xlabel(x_label, fontsize=8)
    figure.savefig(path, dpi=100)


def _draw_pillow(series, path: pathlib.Path) -> None:
    from PIL import Image, ImageDraw

    width, height, left, top, bottom = 420, 280, 64, 28, 24
    columns = min(_COLUMNS, len(series))
    rows = -(-len(series) // columns)
    picture = Image.new("RGB", (width * columns, height * rows), "white")
    pen = ImageDraw.Draw(picture)
    for index, (name, points) in enumerate(series.items()):
        x0 = width * (index % columns) + left
        y0 = height * (index // columns) + top
        x1, y1 = x0 + width - left - 16, y0 + height - top - bottom
        steps, values = zip(*points, strict=True)
        low, high = min(values), max(values)
        spans = (steps[-1] - steps[0] or 1, high - low or 1.0)
        line = [
            (
                x0 + (x1 - x0) * (step - steps[0]) / spans[0],
                y1 - (y1 - y0) * (value - low) / spans[1],
            )
            for step, value in points
        ]
        pen.rectangle((x0, y0, x1, y1), outline="#cccccc")
        if len(line) > 1:
            pen.line(line, fill=_COLOR, width=2)
        else:
            pen.ellipse((line[0][0] - 2, line[0][1] - 2, line[0][0] + 2, line[0][1] + 2), _COLOR)
        pen.text((x0, y0 - 18), f"{name}  (last {values[-1]:.4g})", fill="black")
        pen.text((x0 - left + 6, y0), f"{high:.4g}", fill="#555555")
        pen.text((x0 - left + 6, y1 - 12), f"{low:.4g}", fill="#555555")
        pen.text((x0, y1 + 6), str(steps[0]), fill="#555555")
        pen.text((x1 - 40, y1 + 6), str(steps[-1]), fill="#555555")
    picture.save(path)
