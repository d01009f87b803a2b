"""Tables for the terminal: scores, detectors, recall, diagnosis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from rich.markup import escape
from rich.table import Table

from locos_fast.demo.known_heads import CHANCE, DECOYS, DETECTORS, KINDS, DemoResult
from locos_fast.report.display import shown
from locos_fast.scoring.detectors import LABELS
from locos_fast.scoring.directions import unit_of
from locos_fast.scoring.head_scores import HeadScores, head_name

if TYPE_CHECKING:
    from locos_fast.scoring.diagnosis import Diagnosis


def scores_table(scores: HeadScores, k: int) -> Table:
    """The k best heads with L+, L- and S, in the unit of the scores, which the title names."""
    norm = scores.meta.get("norm")
    table = Table(title=f"Top {k} heads by LOCOS score ({unit_of(norm)}, norm={norm})")
    for column in ("head", "S = L+ - L-", "L+", "L-", "DLA", "attention spatial", "Wu"):
        table.add_column(column, justify="left" if column == "head" else "right", overflow="fold")
    for head in scores.top(k):
        arrays = (scores.score, scores.l_plus, scores.l_minus, scores.dla, scores.attention_spatial, scores.wu)
        table.add_row(head_name(head), *(f"{array[head]:+.4g}" for array in arrays))
    return table


def cost_line(cost: Mapping[str, float | None]) -> str:
    """What a pass cost, `meta["cost"]` of its scores."""
    peak = cost["peak_memory_bytes"]
    memory = "not measured on a CPU" if peak is None else f"{peak / 2**30:.3g} GiB above what was in use before"
    return (
        f"forward {cost['forward_seconds']:.4g} s, scoring {cost['scoring_seconds']:.4g} s "
        f"({cost['overhead']:.2%} of the forward), peak memory {memory}"
    )


def detector_table(result: DemoResult) -> Table:
    """Detector x question type: heads found against heads planted, and what was listed wrongly."""
    table = Table(title="Heads found (at least 10 % of the detector's largest score) against heads planted")
    table.add_column("detector")
    for kind in KINDS:
        table.add_column(f"{kind.replace('_', '-')} questions")
    for detector in DETECTORS:
        table.add_row(LABELS[detector], *(_finding(result, detector, kind) for kind in KINDS))
    return table


def _finding(result: DemoResult, detector: str, kind: str) -> str:
    found, planted = set(result.scores[kind].found(by=detector)), result.planted_heads(kind)
    if found == planted:
        return f"[green]exactly the {len(planted)} planted[/green]"
    roles = {head: role for role in (*DECOYS, *KINDS, "positional") for head in result.planted.heads[role]}
    wrong: dict[str, int] = {}
    for head in found - planted:
        role = roles.get(head, "noise").replace("_", "-")
        wrong[role] = wrong.get(role, 0) + 1
    extra = "".join(f" + {count} {role}" for role, count in sorted(wrong.items()))
    return f"[red]{len(found & planted)} of {len(planted)} planted{extra}[/red]"


def recall_table(result: DemoResult) -> Table:
    """Recall of the intact model, without the found heads, and without layer-matched random heads."""
    recall = result.recall
    table = Table(title="Recall (greedy answers)")
    table.add_column("heads ablated")
    for kind in KINDS:
        table.add_column(f"{kind.replace('_', '-')} (chance {CHANCE[kind]:.0%})", justify="right")
    draws = len(next(iter(recall.control_ablated.values())))
    table.add_row("none", *(f"{recall.intact[kind]:.0%}" for kind in KINDS))
    table.add_row("those LOCOS found", *(f"{recall.found_ablated[kind]:.0%}" for kind in KINDS))
    controls = (recall.control_ablated[kind] for kind in KINDS)
    table.add_row(
        f"random, same layers ({draws} draws: mean, lowest)",
        *(f"{np.mean(draw):.0%}, {min(draw):.0%}" for draw in controls),
    )
    return table


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """Layer by layer: what it is, how many heads of what size, and how exactly they are scored."""
    table = Table(title=f"{escape(shown(diagnosis.model))}: what is scored, and how exactly")
    for column in ("layer", "kind", "heads", "KV heads", "head dim", "residual", "scored"):
        table.add_column(column, justify="left" if column in ("kind", "scored") else "right", overflow="fold")
    for layer in diagnosis.layers:
        size = "-" if layer.head_dim is None else str(layer.head_dim)
        if layer.value_dim != layer.head_dim:
            size += f", values {layer.value_dim}"
        heads = ("-" if count is None else str(count) for count in (layer.heads, layer.kv_heads))
        verdict = layer.verdict if layer.reason is None else f"{layer.verdict}: {layer.reason}"
        table.add_row(str(layer.number), layer.kind, *heads, size, _residual(layer.residual), escape(shown(verdict)))
    return table


def diagnosis_summary(diagnosis: Diagnosis) -> Iterator[str]:
    """The lines below the table."""
    yield f"whole model: {diagnosis.verdict} (residual {_residual(diagnosis.residual)})"
    if diagnosis.frozen_refused is None:
        yield 'norm="frozen" (true logit units) and norm="none" (the published score) are both available'
    else:
        yield f'norm="frozen" (true logit units) is not available: {diagnosis.frozen_refused}'
        yield 'norm="none" (the published score) still works'
    if diagnosis.softcap is not None:
        yield f"final logits are soft-capped at {diagnosis.softcap:g}; contributions are to the logit before that"
    yield f"attention {diagnosis.attn_implementation}, {diagnosis.dtype}, backend {diagnosis.backend}"


def _residual(residual: float | None) -> str:
    return "-" if residual is None else f"{residual:.1e}"
