"""Heat maps of heads, layers x heads, as PNG."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from locos_fast.demo.known_heads import DECOYS, DETECTORS, KINDS, DemoResult
from locos_fast.report.display import shown
from locos_fast.scoring.detectors import LABELS
from locos_fast.scoring.directions import unit_of
from locos_fast.scoring.head_scores import Head, HeadScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = {"planted": ("s", "black"), "read-only decoy": ("o", "tab:orange"), "write-only decoy": ("^", "tab:purple")}
BEST = 5  # heads marked in a heat map


def save_heat_map(scores: HeadScores, path: Path, *, title: str) -> None:
    """One heat map, layers x heads, of the LOCOS score, its best heads marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, heads = scores.score.shape
    figure, axes = pyplot.subplots(figsize=(2 + 0.25 * heads, 1.5 + 0.25 * layers), layout="constrained")
    draw_heads(axes, scores, "score", shown(title), unit=unit_of(scores.meta.get("norm")))
    for layer, head in scores.top(BEST):
        axes.scatter(head, layer, s=60, marker="s", facecolors="none", edgecolors="black")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a model's name may be in any script
        figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save_demo_picture(result: DemoResult, path: Path) -> None:
    """Question types x detectors, layers x heads each, with the planted heads and the decoys marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = (len(KINDS), len(DETECTORS))
    figure, grid = pyplot.subplots(*shape, figsize=(4 * shape[1], 2.6 * shape[0]), layout="constrained", squeeze=False)
    for row, kind in zip(grid, KINDS, strict=True):
        decoys = {f"{role.replace('_', '-')} decoy": result.planted.heads[role] for role in DECOYS}
        found = {"planted": result.planted_heads(kind), **decoys}
        for axes, detector in zip(row, DETECTORS, strict=True):
            title = f"{LABELS[detector]}, {kind.replace('_', '-')}"
            draw_heads(axes, result.scores[kind], detector, title, found)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(MARKS))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_heads(
    axes: Axes,
    scores: HeadScores,
    by: str,
    title: str,
    found: Mapping[str, Iterable[Head]] | None = None,
    marks: Mapping[str, tuple[str, str]] | None = None,
    *,
    unit: str | None = None,
) -> None:
    """Array `by` of the scores, layers x heads, into axes; the heads of each group of `found` get that group's mark, a
    matplotlib marker and its colour, and its name as label."""
    values = getattr(scores, by)
    limit = np.nanmax(np.abs(values), initial=0.0) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.9, label=unit)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_title(title, parse_math=False)
    for label, heads in (found or {}).items():
        marker, colour = (marks or MARKS)[label]
        at = list(heads)
        axes.scatter(
            [head for _, head in at],
            [layer for layer, _ in at],
            s=60,
            marker=marker,
            facecolors="none",
            edgecolors=colour,
            label=label,
        )
