"""What a scan found, read from its folder: the means of the trials that count, intervals, and how far they agree."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from locos_fast.scans.statistics import agreement, bootstrap, shared_with
from locos_fast.scans.store import ScanFolder
from locos_fast.scoring.detectors import in_order
from locos_fast.scoring.head_scores import HeadScores, nan_mean

SHOWN_MISSES = 3


class Cell(NamedTuple):
    """Trials of one prompt length and depth."""

    length: int  # tokens
    depth: float  # percent
    ended: int  # trials that were scored or gated out
    passed: int


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

    They depend on the trials alone, not on the order in which they were run. Raises ValueError, and shows what the
    model would have answered, if no trial counts.
    """
    manifest, lines = folder.read_manifest(), folder.lines()
    entries = manifest["trials"]
    statuses = Counter(lines[entry["key"]]["status"] if entry["key"] in lines else "open" for entry in entries)
    cells = _cells(entries, lines)
    scored = [entry for entry in entries if lines.get(entry["key"], {}).get("status") == "scored"]
    if not scored:
        raise ValueError(why_nothing(folder, {}))
    stacks = {name: stack.astype(np.float64) for name, stack in folder.read_arrays([e["key"] for e in scored]).items()}
    interval, found = bootstrap(stacks["score"]), agreement(stacks["score"])
    statistics: dict[str, Any] = {name: value if _finite(value) else None for name, value in found._asdict().items()}
    means = {name: nan_mean(stacks[name]) for name in in_order(stacks)}
    statistics["shared_with_locos"] = shared_with(means, "score", found.top_k)
    meta = {
        **manifest["config"],
        "trials": {"planned": len(entries), **statuses},
        "gate_rate": gate_rate(statuses),
        "gate_rate_by_cell": [cell._asdict() for cell in cells],
        "statistics": statistics,
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


def gate_rate(statuses: dict[str, int]) -> float | None:
    """Share of trials that counted among those that were scored or gated out; None without any."""
    passed, gated = statuses.get("scored", 0), statuses.get("gated", 0)
    return passed / (passed + gated) if passed + gated else None


def _cells(entries: list[dict[str, Any]], lines: dict[str, dict[str, Any]]) -> list[Cell]:
    ended: Counter[tuple[int, float]] = Counter()
    passed: Counter[tuple[int, float]] = Counter()
    for entry in entries:
        status = lines.get(entry["key"], {}).get("status")
        if status in ("scored", "gated"):
            ended[entry["length"], entry["depth"]] += 1
            passed[entry["length"], entry["depth"]] += status == "scored"
    return [Cell(*cell, ended[cell], passed[cell]) for cell in sorted(ended)]


def why_nothing(folder: ScanFolder, replies: dict[str, str]) -> str:
    """Why no trial counts: how the trials ended, and what was said where another answer was wanted.

    replies: what the model says to some of the trials, by their keys; else what their lines tell.
    """
    entries, lines = folder.read_manifest()["trials"], folder.lines()
    statuses = Counter(lines[entry["key"]]["status"] if entry["key"] in lines else "open" for entry in entries)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    gated = [entry for entry in entries if lines.get(entry["key"], {}).get("status") == "gated"]
    gated.sort(key=lambda entry: entry["key"] not in replies)
    said = [
        f"for {entry['answer']!r} the model says {replies.get(entry['key'], _said(lines[entry['key']])).strip()!r}"
        for entry in gated
    ]
    reasons = [line["reason"] for line in lines.values() if "reason" in line]
    return f"no trial counts ({counts}): {'; '.join([*said, *reasons][:SHOWN_MISSES]) or 'none has been run'}"


def _said(line: dict[str, Any]) -> str:
    return line["generated"] if "generated" in line else "".join(line["predicted"])


def _finite(value: float) -> bool:
    return math.isfinite(value)
