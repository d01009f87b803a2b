"""What a scan found, read from its folder: the means of the trials that count, intervals, and how far they agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from locos_fast.scans.statistics import (
    agreement,
    bootstrap,
    shared_with,
    trials_that_say_anything,
    well_known,
)
from locos_fast.scans.store import DONE, ScanFolder
from locos_fast.scoring.detectors import in_order
from locos_fast.scoring.head_scores import HeadScores, nan_mean

SHOWN_MISSES = 3

Array = NDArray[np.float64]
Lines = dict[str, dict[str, Any]]


class Cell(NamedTuple):
    """Trials of one prompt length and depth. `passed` counts what the model answered right, with and without a gate."""

    length: int  # tokens
    depth: float  # percent
    ended: int  # trials that were scored or gated out
    passed: int


class NothingCountsError(ValueError):
    """No trial counts. `statuses`: how the trials ended, as `Scan` has them."""

    def __init__(self, why: str, statuses: Mapping[str, int]) -> None:
        super().__init__(why)
        self.statuses = dict(statuses)

    @classmethod
    def of(cls, folder: ScanFolder, replies: Mapping[str, str]) -> NothingCountsError:
        """Why no trial in the folder counts. replies: what the model says to some trials, by their keys."""
        return nothing_counts(folder.read_manifest()["trials"], folder.lines(), replies)


class Scan(NamedTuple):
    """A scan as it stands.

    scores    means over the trials that count, with interval and `per_trial`; `meta` is the scan's config.json
    statuses  how many trials ended how; "open" for those that did not
    cells     gate rates by prompt length and depth
    """

    scores: HeadScores
    statuses: dict[str, int]
    cells: list[Cell]


def conclude(folder: ScanFolder) -> Scan:
    """Compute means and statistics of the trials in the folder and write them there as a score folder.

    They depend on the trials alone, not on the order in which they were run. Raises NothingCountsError, a ValueError,
    which shows what the model would have answered, if no trial counts.
    """
    manifest, lines = folder.read_manifest(), folder.lines()
    entries = manifest["trials"]
    statuses = _statuses(entries, lines)
    cells = _cells(entries, lines)
    scored = [entry for entry in entries if lines.get(entry["key"], {}).get("status") == "scored"]
    if not scored:
        raise nothing_counts(entries, lines)
    kept = folder.read_arrays([entry["key"] for entry in scored], lines)
    stacks: dict[str, Array] = {name: kept[name].astype(np.float64) for name in in_order(kept)}
    interval = bootstrap(stacks["score"], contexts=[entry.get("context", entry["key"]) for entry in scored])
    means = {name: nan_mean(stack) for name, stack in stacks.items()}
    meta = {
        **manifest["config"],
        "trials": {"planned": len(entries), **statuses},
        "trials_by_detector": {name: trials_that_say_anything(stack) for name, stack in stacks.items()},
        "gate_rate": gate_rate(cells),
        "gate_rate_by_cell": [cell._asdict() for cell in cells],
        "statistics": _statistics(stacks, means),
        "per_trial_ids": [entry["id"] for entry in scored],
    }
    scores = HeadScores.of(
        means,
        meta=meta,
        per_trial=stacks["score"],
        ci_low=interval.low,
        ci_high=interval.high,
    )
    scores.save_pretrained(folder.path, overwrite=True)
    return Scan(scores, dict(statuses), cells)


def _statistics(stacks: dict[str, Array], means: dict[str, Array]) -> dict[str, Any]:
    """Of config.json. A mean over fewer than half of the trials that say anything is not ranked with the others."""
    found = agreement(stacks["score"])
    ranked = {name: np.where(well_known(stack), means[name], np.nan) for name, stack in stacks.items()}
    shared = shared_with(ranked, "score", found.top_k)
    return {
        **{name: value if math.isfinite(value) else None for name, value in found._asdict().items()},
        "shared_with_locos": {name: of_both.shared for name, of_both in shared.items()},
        "best_heads": {name: of_both.of for name, of_both in shared.items()},
    }


def gate_rate(cells: Sequence[Cell]) -> float | None:
    """Share of trials that the model answered right among those that were scored or gated out; None without any."""
    ended = sum(cell.ended for cell in cells)
    return sum(cell.passed for cell in cells) / ended if ended else None


def _statuses(entries: list[dict[str, Any]], lines: Lines) -> dict[str, int]:
    return Counter(lines[entry["key"]]["status"] if entry["key"] in lines else "open" for entry in entries)


def _cells(entries: list[dict[str, Any]], lines: Lines) -> list[Cell]:
    ended: Counter[tuple[int, float]] = Counter()
    passed: Counter[tuple[int, float]] = Counter()
    for entry in entries:
        line = lines.get(entry["key"], {})
        if line.get("status") in DONE:
            ended[entry["length"], entry["depth"]] += 1
            passed[entry["length"], entry["depth"]] += _right(line)
    return [Cell(*cell, ended[cell], passed[cell]) for cell in sorted(ended)]


def _right(line: dict[str, Any]) -> bool:
    """Whether the model's own answer was right. Lines that do not say so were written behind a gate."""
    return bool(line.get("right", line["status"] == "scored"))


def nothing_counts(
    entries: list[dict[str, Any]], lines: Lines, replies: Mapping[str, str] | None = None
) -> NothingCountsError:
    """Why no trial of a manifest counts: how they ended, and what was said where another answer was wanted.

    replies: what the model says to some of the trials, by their keys; else what their lines tell.
    """
    replies, statuses = replies or {}, _statuses(entries, lines)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    gated = [entry for entry in entries if lines.get(entry["key"], {}).get("status") == "gated"]
    gated.sort(key=lambda entry: entry["key"] not in replies)
    said = [
        f"for {entry['answer']!r} the model says {replies.get(entry['key'], _said(lines[entry['key']])).strip()!r}"
        for entry in gated
    ]
    reasons = [line["reason"] for line in lines.values() if "reason" in line]
    why = "; ".join([*said, *reasons][:SHOWN_MISSES]) or "none has been run"
    return NothingCountsError(f"no trial counts ({counts}): {why}", statuses)


def _said(line: dict[str, Any]) -> str:
    return line["generated"] if "generated" in line else "".join(line.get("predicted", ()))
