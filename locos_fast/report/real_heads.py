"""The demonstration on a real model, told: table, picture, numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from locos_fast.demo.real_heads import ABLATED, CONTROL_DRAWS, DETECTORS, RealResult
from locos_fast.report.pictures import draw_heads
from locos_fast.scoring.directions import unit_of
from locos_fast.scoring.head_scores import Head

FEW, MANY = ABLATED
TITLE = "SmolLM2-135M-Instruct: recall left when the best heads of each detector are ablated"


def recall_table(results: Mapping[str, RealResult]) -> Table:
    """Detector x (question type, heads ablated): recall left."""
    table = Table(title=TITLE, caption=_caption(results), caption_justify="left")
    table.add_column("heads chosen by")
    for kind in results:
        for k in ABLATED:
            table.add_column(f"{_spoken(kind)}, {k} heads", justify="right")
    table.add_row("none ablated", *(f"{1:.0%}" for _ in results for _ in ABLATED), end_section=True)
    for key, detector in DETECTORS.items():
        recall = [result.ablated[key][k] for result in results.values() for k in ABLATED]
        table.add_row(detector.name, *("-" if share is None else f"{share:.0%}" for share in recall))
    table.add_section()
    draws = [result.layer_matched[k] for result in results.values() for k in ABLATED]
    table.add_row(
        f"random, LOCOS's layers ({CONTROL_DRAWS} draws: mean, lowest)",
        *(f"{np.mean(draw):.0%}, {min(draw):.0%}" for draw in draws),
    )
    return table


def _caption(results: Mapping[str, RealResult]) -> str:
    lines = []
    for kind, result in results.items():
        lines.append(
            f"{_spoken(kind)}: {result.tested} test trials, others than the {result.scored} scored; "
            f"{result.tested + result.scored} of {result.asked} questions asked were answered right and kept"
        )
        lines += [
            f"{_spoken(kind)}: {result.borrowed[k]} of the {k} random heads are of the nearest layer, "
            "their own has no other head left"
            for k in ABLATED
            if result.borrowed[k]
        ]
        lines += [
            f"{_spoken(kind)}: {detector.name} gives {len(result.best[key])} heads a score above zero"
            for key, detector in DETECTORS.items()
            if len(result.best[key]) < MANY
        ]
    return "\n".join(lines)


def save_picture(results: Mapping[str, RealResult], path: Path) -> None:
    """LOCOS scores, layers x heads, of each question type, the best heads marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, row = pyplot.subplots(1, len(results), figsize=(4.2 * len(results), 7), layout="constrained", squeeze=False)
    marks = {f"best {FEW}": ("s", "black"), f"best {FEW + 1} to {MANY}": ("o", "black")}
    for axes, (kind, result) in zip(row[0], results.items(), strict=True):
        best = result.best["locos"]
        found = dict(zip(marks, (best[:FEW], best[FEW:]), strict=True))
        title = f"LOCOS score, {_spoken(kind)} questions"
        draw_heads(axes, result.scores["none"], "score", title, found, marks, unit=unit_of("none"))
        axes.set_yticks(range(0, len(result.scores["none"].score), 2))
    handles, labels = row[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(marks))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def as_dict(results: Mapping[str, RealResult]) -> dict[str, Any]:
    """All numbers, for JSON. Recall is 0 to 1; None where a detector gives too few heads a score above zero."""
    return {
        kind: {
            "intact": 1.0,  # all trials that count are answered right by the intact model
            "ablated": {key: _by_count(recall) for key, recall in result.ablated.items()},
            "layer_matched": _by_count(result.layer_matched),
            "layer_matched_borrowed": _by_count(result.borrowed),
            "trials": {"asked": result.asked, "scored": result.scored, "tested": result.tested},
            "heads": {key: [_name(head) for head in heads] for key, heads in result.best.items()},
        }
        for kind, result in results.items()
    }


def _by_count(values: Mapping[int, Any]) -> dict[str, Any]:
    return {str(k): value for k, value in values.items()}


def _name(head: Head) -> str:
    return f"{head[0]}-{head[1]}"


def _spoken(kind: str) -> str:
    return kind.replace("_", "-")
