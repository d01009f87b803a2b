"""One picture per suite and device kind, results/SUITE-cpu.png or -cuda.png: the median, with 20 % to 80 % shaded."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter

from benchmarks.suite import Panel

COLUMNS = 2


def draw(panels: list[Panel], heading: str, file: Path) -> Path:
    """Write the picture; returns the file. Lines without points are left out."""
    n_rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(13, 4.5 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=8)
    for axes, panel in zip(figure.subplots(n_rows, COLUMNS, squeeze=False).flat, panels, strict=False):
        _draw_panel(axes, panel)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    return file


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    ticks = set()
    for number, line in enumerate(panel.lines):
        if not line.points:
            continue
        x, low, median, high = zip(*line.points, strict=True)
        ticks.update(x)
        colour = f"C{number % 10}"  # a provider has the same one on all axes
        dashes = "-" if number < 10 else "--"
        axes.plot(x, median, dashes, color=colour, marker="o", markersize=4, label=line.label)
        axes.fill_between(x, low, high, color=colour, alpha=0.15)
    if ticks:
        axes.set_xticks(sorted(ticks), [f"{tick:,.0f}" for tick in sorted(ticks)])
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=7)
    if panel.unit == "%":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(panel.unit))
    axes.yaxis.set_minor_formatter(NullFormatter())
