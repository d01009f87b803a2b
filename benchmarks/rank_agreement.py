"""python -m benchmarks.rank_agreement SINGLE PACKED: how far two scans of one model agree on its heads.

For a scan with several needles to a context beside one with a single needle, whose trials are others: the other needles
are distractors. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.terminal import console
from locos_fast import HeadScores
from locos_fast.scans.statistics import spearman

BEST = 10


class RankAgreement(NamedTuple):
    """Of one array of scores of two scans."""

    by: str
    best: int  # heads that each scan calls its best
    shared: int  # of those, in both
    spearman: float  # rank correlation over all heads, -1 to 1
    trials: tuple[int, int]  # that count, of the one and of the other

    def __str__(self) -> str:
        one, other = self.trials
        return (
            f"{self.by}: {self.shared} of the {self.best} best heads are the same, Spearman {self.spearman:.3f} over "
            f"all heads ({one} and {other} trials count)"
        )


def rank_agreement(one: HeadScores, other: HeadScores, *, best: int = BEST, by: str = "score") -> RankAgreement:
    """Raises ValueError for scores of other models, and where a scan gives all heads the same score."""
    a, b = getattr(one, by), getattr(other, by)
    models = [scores.meta.get("model") for scores in (one, other)]
    if models[0] != models[1] or a.shape != b.shape:
        raise ValueError(f"scans: expected two of one model, got {models[0]} {a.shape} and {models[1]} {b.shape}")
    known = ~np.isnan(a) & ~np.isnan(b)
    if min(len(np.unique(values[known])) for values in (a, b)) < 2:
        raise ValueError(f"scans: expected scores that differ between heads, got the same {by} for all")
    shared = len(set(one.top(best, by=by)) & set(other.top(best, by=by)))
    counts = [1 if scores.per_trial is None else len(scores.per_trial) for scores in (one, other)]
    return RankAgreement(by, best, shared, spearman(a[known], b[known]), (counts[0], counts[1]))


def main(argv: Sequence[str] | None = None) -> int:
    """0 if both folders could be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_agreement", description=__doc__)
    parser.add_argument("folders", type=Path, nargs=2, metavar="SCAN", help="a folder that `locos-fast scan` wrote")
    parser.add_argument("--best", type=int, default=BEST, help="how many heads count as the best")
    options = parser.parse_args(argv)
    try:
        one, other = (HeadScores.from_pretrained(folder) for folder in options.folders)
        found = rank_agreement(one, other, best=options.best)
    except (OSError, ValueError) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        return 2
    for folder, scores in zip(options.folders, (one, other), strict=True):
        kind, needles = (scores.meta.get(name, "unknown") for name in ("contexts", "needles_per_context"))
        console.print(f"{folder}: contexts {kind}, needles per context {needles}", highlight=False, markup=False)
    console.print(str(found), highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
