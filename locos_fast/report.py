"""What people look at: tables for the terminal, heat maps as PNG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from locos_fast.demo import CHANCE, DECOYS, DETECTORS, KINDS, DemoResult
from locos_fast.head_scores import DETECTOR_NAMES, Head, HeadScores, head_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from locos_fast.diagnosis import Diagnosis

MARKS = {"planted": ("s", "black"), "read_only": ("o", "tab:orange"), "write_only": ("^", "tab:purple")}


def scores_table(scores: HeadScores, k: int) -> Table:
    """The k best heads with L+, L- and S, in logits."""
    norm = scores.meta.get("norm")
    unit = "logits" if norm == "frozen" else "logits before the final norm"
    table = Table(title=f"Top {k} heads by LOCOS score ({unit}, norm={norm})")
    for column in ("head", "S = L+ - L-", "L+", "L-", "DLA", "attention-spatial", "Wu"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for head in scores.top(k):
        arrays = (scores.score, scores.l_plus, scores.l_minus, scores.dla, scores.attention_spatial, scores.wu)
        table.add_row(head_name(head), *(f"{array[head]:+.4g}" for array in arrays))
    return table


def cost_line(cost: Mapping[str, float | None]) -> str:
    """What a pass cost, `meta["cost"]` of its scores."""
    peak = cost["peak_memory_bytes"]
    memory = "unknown" if peak is None else f"{peak / 2**30:.3g} GiB above what was in use before"
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
        table.add_row(DETECTOR_NAMES[detector], *(_finding(result, detector, kind) for kind in KINDS))
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
    table = Table(title=f"{diagnosis.model}: what is scored, and how exactly")
    for column in ("layer", "kind", "heads", "KV heads", "head dim", "residual", "scored"):
        table.add_column(column, justify="left" if column in ("kind", "scored") else "right")
    for layer in diagnosis.layers:
        size = "-" if layer.head_dim is None else str(layer.head_dim)
        if layer.value_dim != layer.head_dim:
            size += f", values {layer.value_dim}"
        heads = ("-" if count is None else str(count) for count in (layer.heads, layer.kv_heads))
        verdict = layer.verdict if layer.reason is None else f"{layer.verdict}: {layer.reason}"
        table.add_row(str(layer.number), layer.kind, *heads, size, _residual(layer.residual), verdict)
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


def save_heat_map(scores: HeadScores, path: Path, *, title: str) -> None:
    """One heat map, layers x heads, of the LOCOS score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, heads = scores.score.shape
    figure, axes = pyplot.subplots(figsize=(2 + 0.25 * heads, 1.5 + 0.25 * layers), layout="constrained")
    _draw(axes, scores, "score", title)
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
        marks = {"planted": result.planted_heads(kind)} | {role: result.planted.heads[role] for role in DECOYS}
        for axes, detector in zip(row, DETECTORS, strict=True):
            _draw(axes, result.scores[kind], detector, f"{DETECTOR_NAMES[detector]}, {kind.replace('_', '-')}", marks)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(MARKS))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(
    axes: Axes, scores: HeadScores, by: str, title: str, marks: Mapping[str, Iterable[Head]] | None = None
) -> None:
    values = getattr(scores, by)
    limit = np.nanmax(np.abs(values), initial=0.0) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.9)
    axes.set(xlabel="head", ylabel="layer", title=title)
    for role, heads in (marks or {}).items():
        marker, colour = MARKS[role]
        layer_of, head_of = zip(*heads, strict=True)
        label = role.replace("_", "-") + ("" if role == "planted" else " decoy")
        axes.scatter(head_of, layer_of, s=60, marker=marker, facecolors="none", edgecolors=colour, label=label)
