"""What people look at of an attribution: tables of passages for the terminal, and a picture of the whole prompt."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from locos_fast.scoring.directions import unit_of
from locos_fast.scoring.head_scores import head_name
from locos_fast.scoring.passages import Passage, PassageAttribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 400  # of the heat map, at most
ROWS = 16  # heads in the heat map, at most
NUMBERED = 5  # passages with their rank in the picture, at most
WORTH_A_NUMBER = 0.05  # of the largest sum
TEXT_WIDTH = 120  # characters of a passage in a table


def passages_table(result: PassageAttribution, k: int) -> Table:
    """The k passages from which most was written toward the answer, all heads together."""
    table = Table(title=f"Top {k} passages by what all heads wrote from them ({unit_of('none')})")
    for column in ("rank", "written", "tokens", "most by"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("text")  # the one column that shrinks, see `one_line`
    for rank, index in enumerate(result.top_passages(k), 1):
        head, passage = result.strongest_head(index), result.passages[index]
        most = f"{head_name(head)} {result.logits[*head, index]:+.4g}"
        table.add_row(str(rank), f"{result.totals[index]:+.4g}", _span(passage), most, one_line(passage.text))
    return table


def pairs_table(result: PassageAttribution, k: int) -> Table:
    """The k (head, passage) pairs of which most was written."""
    table = Table(title=f"Top {k} pairs of head and passage ({unit_of('none')})")
    for column in ("head", "written", "tokens"):
        table.add_column(column, justify="left" if column == "head" else "right", no_wrap=True)
    table.add_column("text")  # the one column that shrinks, see `one_line`
    for head, index, logits in result.top_pairs(k):
        passage = result.passages[index]
        table.add_row(head_name(head), f"{logits:+.4g}", _span(passage), one_line(passage.text))
    return table


def one_line(text: str, width: int = TEXT_WIDTH) -> Text:
    """The beginning of a text, on one line and without characters that a terminal would obey."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: 20 * width]).split())
    words = words if len(words) <= width else f"{words[: width - 1]}…"
    return Text(words, no_wrap=True, overflow="ellipsis")


def _span(passage: Passage) -> str:
    return f"{passage.start}:{passage.end}"  # as --segments takes it


def save_picture(result: PassageAttribution, path: Path) -> None:
    """Along the prompt's tokens: the sum over all heads of each passage, and below it the heads that wrote most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heads = strongest_heads(result, ROWS)
    figure, (bars, map_) = pyplot.subplots(
        2, figsize=(12, 4 + 0.2 * len(heads)), height_ratios=(2.5, 0.8 + 0.2 * len(heads)), sharex=True,
        layout="constrained",
    )  # fmt: skip
    _draw_bars(bars, result)
    _draw_heads(map_, result, heads)
    title = one_line(f"{result.meta.get('model')}: written toward {result.meta.get('answer')!r}", 100).plain
    bars.set_title(title, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # an answer may be in any script
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def strongest_heads(result: PassageAttribution, k: int) -> list[tuple[int, int]]:
    """The k heads with the largest magnitude in any one passage, largest first; NaN heads are left out."""
    magnitude = np.max(np.abs(result.logits), axis=2)  # NaN stays NaN
    order = np.argsort(-magnitude, axis=None, kind="stable")[:k]  # NaN sorts last
    return [divmod(int(i), magnitude.shape[1]) for i in order if not np.isnan(magnitude.flat[i])]


def along_tokens(values: NDArray, passages: list[Passage], tokens: int, columns: int) -> NDArray:
    """(rows, passages) -> (rows, columns): equal steps along the tokens, each with the value of largest magnitude that
    a passage has there, so that a short passage is not averaged away; NaN where there is none."""
    drawn = np.full((len(values), columns), np.nan)
    first = [passage.start * columns // tokens for passage in passages]
    last = [-(-passage.end * columns // tokens) for passage in passages]
    for row, line in zip(drawn, values, strict=True):
        for index in np.argsort(np.abs(line), kind="stable"):  # larger ones over smaller ones
            row[first[index] : last[index]] = line[index]
    return drawn


def _draw_bars(axes: Axes, result: PassageAttribution) -> None:
    from matplotlib.collections import PolyCollection

    outlines = [
        [(passage.start, 0), (passage.start, height), (passage.end, height), (passage.end, 0)]
        for passage, height in zip(result.passages, result.totals, strict=True)
    ]
    colours = np.where(result.totals >= 0, "tab:red", "tab:blue")
    # the outline, one pixel wide, keeps a bar visible that is narrower than that
    axes.add_collection(PolyCollection(outlines, facecolors=colours, edgecolors=colours, linewidths=1))
    axes.axhline(0, color="black", linewidth=0.6)
    tokens = result.meta["prompt_tokens"]
    axes.set(xlim=(-0.01 * tokens, 1.01 * tokens), ylabel="written by all heads")  # or the frame hides the first token
    axes.margins(y=0.15)
    axes.autoscale_view(scalex=False)
    for rank, index in enumerate(result.top_passages(NUMBERED), 1):
        passage, height = result.passages[index], result.totals[index]
        if height <= WORTH_A_NUMBER * result.totals.max():
            break
        place = ((passage.start + passage.end) / 2, height)
        axes.annotate(str(rank), place, xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)


def _draw_heads(axes: Axes, result: PassageAttribution, heads: list[tuple[int, int]]) -> None:
    tokens = result.meta["prompt_tokens"]
    values = np.stack([result.logits[head] for head in heads])
    drawn = along_tokens(values, result.passages, tokens, min(tokens, COLUMNS))
    limit = np.nanmax(np.abs(drawn), initial=0.0) or 1.0
    axes.set_facecolor("lightgrey")  # where no passage lies
    image = axes.imshow(
        drawn, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest",
        extent=(0, tokens, len(heads) - 0.5, -0.5),
    )  # fmt: skip
    axes.figure.colorbar(image, ax=axes, label=unit_of("none"), shrink=0.9)
    axes.set_yticks(range(len(heads)), [head_name(head) for head in heads], fontsize=7)
    axes.set(xlabel="token of the prompt", ylabel=f"{len(heads)} strongest heads")
