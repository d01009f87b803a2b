"""A scan in tables: its best heads with intervals, and how often the model was right by length and depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from locos_fast.scans.statistics import active_share, best_heads, known_trials, well_known
from locos_fast.scoring.detectors import LABELS, in_order
from locos_fast.scoring.directions import unit_of
from locos_fast.scoring.head_scores import Head, HeadScores, head_name

BEST_SHOWN = 5
PARTS_OF_LOCOS = ("l_plus", "l_minus")
NOT_SEEN = "none: no row of an answer sees the needle"

if TYPE_CHECKING:
    from locos_fast.scans.result import Cell


def ranked_heads(scores: HeadScores, k: int) -> list[Head]:
    """The k best heads; those known in fewer than half of the trials stand behind all others."""
    assert scores.per_trial is not None
    often = well_known(scores.per_trial)
    heads = scores.top(scores.score.size)
    return sorted(heads, key=lambda head: not often[head])[:k]


def scan_heads(scores: HeadScores, k: int) -> list[dict[str, Any]]:
    """The k best heads with their intervals, for JSON; null where there is none."""
    assert scores.ci_low is not None and scores.ci_high is not None and scores.per_trial is not None
    active, known = active_share(scores.per_trial), known_trials(scores.per_trial)
    return [
        {
            "head": f"{head[0]}-{head[1]}",
            "score": float(scores.score[head]),
            "ci_low": _or_null(scores.ci_low[head]),
            "ci_high": _or_null(scores.ci_high[head]),
            "trials": int(known[head]),
            "active": float(active[head]),
        }
        for head in ranked_heads(scores, k)
    ]


def _or_null(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def scan_table(scores: HeadScores, k: int) -> Table:
    """The k best heads: mean score over the trials that count, its interval, in how many trials it is known, in how
    many of those it is active (has a tenth of the trial's largest score)."""
    assert scores.ci_low is not None and scores.ci_high is not None and scores.per_trial is not None
    unit, trials = unit_of(scores.meta["norm"]), len(scores.per_trial)
    table = Table(title=f"Top {k} heads by LOCOS score over {trials} trials ({unit})")
    active, known = active_share(scores.per_trial), known_trials(scores.per_trial)
    for column in ("head", "S", "95 % interval", "known in", "active in"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for head in ranked_heads(scores, k):
        interval = f"{scores.ci_low[head]:+.4g} to {scores.ci_high[head]:+.4g}"
        table.add_row(
            head_name(head),
            f"{scores.score[head]:+.4g}",
            interval if math.isfinite(scores.ci_low[head]) else "too few trials",
            f"{known[head]} of {trials}",
            f"{active[head]:.0%}",
        )
    if not known.any():
        table.caption = NOT_SEEN
    return table


def detectors_table(scores: HeadScores) -> Table:
    """What each detector puts first, and how many of its best heads are among LOCOS's."""
    found, trials = scores.meta["statistics"], scores.meta.get("trials_by_detector", {})
    table = Table(title="What every detector puts first, from the same passes")
    for column in ("detector", f"{BEST_SHOWN} best heads", f"of its {found['top_k']} best, LOCOS has"):
        table.add_column(column, justify="right" if column.startswith("of its") else "left", overflow="fold")
    most = max(trials.values(), default=0)
    for name in in_order(scores.names):
        if name in PARTS_OF_LOCOS:
            continue
        label, shared = LABELS.get(name, name), ""
        if trials.get(name, most) < most:
            label += f" ({trials[name]} of {most} trials)"
        if name != "score":
            shared = f"{found['shared_with_locos'][name]} of {found['best_heads'][name]}"
        table.add_row(label, _best(scores.array(name)), shared)
    return table


def _best(mean: NDArray) -> str:
    if np.isnan(mean).all():
        return NOT_SEEN
    heads = best_heads(mean, BEST_SHOWN)
    if not heads:
        return "none: no head is above zero" if mean[mean == mean].any() else "none: zero for every head"
    return " ".join(map(head_name, heads))


def gate_table(cells: Sequence[Cell]) -> Table:
    """Prompt length x depth: in how many trials the model's own answer was right, with and without a gate."""
    depths = sorted({cell.depth for cell in cells})
    table = Table(title="Trials that the model answered right, by prompt length and needle depth")
    table.add_column("tokens", justify="right")
    for depth in depths:
        table.add_column(f"{depth:.3g} %", justify="right")
    by_place = {(cell.length, cell.depth): f"{cell.passed} of {cell.ended}" for cell in cells}
    for length in sorted({cell.length for cell in cells}):
        table.add_row(str(length), *(by_place.get((length, depth), "-") for depth in depths))
    return table


def statistics_line(scores: HeadScores) -> str:
    """How far the trials agree, in one line."""
    found = scores.meta["statistics"]
    return (
        f"split-half reliability {_number(found['split_half'])}, churn of the {found['top_k']} best heads between "
        f"trials {_number(found['churn'])}, Gini {_number(found['gini'])}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
