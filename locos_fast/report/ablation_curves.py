"""An ablation sweep as a table and a picture: recall over the number of heads taken away, beside its controls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.table import Table

from locos_fast.report.display import shown
from locos_fast.scans.sweep import BOTTOM, CONTROLS, GIVEN, Sweep
from locos_fast.scoring.detectors import LABELS

COLOURS = {CONTROLS[0]: "black", CONTROLS[1]: "tab:gray", BOTTOM: "tab:olive"}


def label_of(name: str) -> str:
    """Of a set of heads, for people."""
    return {BOTTOM: "lowest by the first", GIVEN: "given heads"}.get(name) or LABELS.get(name, name)


def recall_table(found: Sweep) -> Table:
    """Sets of heads x how many: recall without them; of controls the mean and the range over their draws."""
    table = Table(title=f"Recall without the k best heads; {found.passed} of {found.trials} trials count")
    table.add_column("heads by")
    for k in found.ks:
        table.add_column(f"k = {k}", justify="right")
    for name in found.names:
        table.add_row(label_of(name), *(_cell(found.values(name, k)) for k in found.ks))
    return table


def null_table(found: Sweep) -> Table:
    """The first set beside its controls: where it stands among the draws, and the exact permutation p-value."""
    name = found.names[0]
    table = Table(title=f"{label_of(name)} among the draws of its controls")
    for column in ("k", "control", "draws", "percentile", "p", "smallest p possible"):
        table.add_column(column, justify="left" if column == "control" else "right")
    for k in found.ks:
        for control in CONTROLS:
            if (against := found.against(name, k, control)) is not None:
                numbers = (f"{against.percentile:.3g}", f"{against.p_value:.3g}", f"{against.resolution:.3g}")
                table.add_row(str(k), label_of(control), str(against.draws), *numbers)
    return table


def _cell(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.0%}" if values else "-"
    return f"{np.mean(values):.0%} ({min(values):.0%} to {max(values):.0%}, {len(values)} draws)"


def save_curves(found: Sweep, path: Path, *, title: str) -> None:
    """Recall over k, a line for each set; controls with a band from their lowest to their highest draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name in found.names:
        values = [found.values(name, k) for k in found.ks]
        of_all = [(0, [1.0]), *zip(found.ks, values, strict=True)]
        known = [(k, numbers) for k, numbers in of_all if numbers]
        ks, means = [k for k, _ in known], [100 * np.mean(numbers) for _, numbers in known]
        style = {"linestyle": "--"} if name in COLOURS else {"marker": "o", "markersize": 4}
        (line,) = axes.plot(ks, means, label=label_of(name), color=COLOURS.get(name), **style)
        if max(map(len, values)) > 1:
            low, high = ([100 * of(numbers) for _, numbers in known] for of in (min, max))
            axes.fill_between(ks, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(xlabel="heads taken away", ylabel="recall, % of trials", ylim=(-3, 103))
    axes.set_title(shown(title), parse_math=False)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
