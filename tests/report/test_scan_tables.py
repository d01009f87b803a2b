"""Tables of a scan claim no more than its trials say."""

from __future__ import annotations

import json

import numpy as np

from locos_fast.report.scan_tables import NOT_SEEN, detectors_table, gate_table, scan_heads, scan_table
from locos_fast.scans.result import Cell
from locos_fast.scans.statistics import bootstrap
from locos_fast.scoring.head_scores import ARRAYS, HeadScores, nan_mean

TRIALS = 8


def scores_of(per_trial: np.ndarray, **others: np.ndarray) -> HeadScores:
    mean = nan_mean(per_trial)
    low, high = bootstrap(per_trial)
    names = (*ARRAYS, *others)
    meta = {
        "norm": "none",
        "trials_by_detector": dict.fromkeys(names, TRIALS),
        "statistics": {
            "top_k": 10,
            "shared_with_locos": dict.fromkeys(names, 3),
            "best_heads": dict.fromkeys(names, 4),
        },
    }
    return HeadScores.of(dict.fromkeys(ARRAYS, mean) | others, meta=meta, per_trial=per_trial, ci_low=low, ci_high=high)


def seen_once() -> np.ndarray:
    """Three heads, of which the last one is largest and known in one trial only."""
    found = np.random.default_rng(0).normal(size=(TRIALS, 1, 3)) * 0.01 + [[1.0, 2.0, 50.0]]
    found[1:, 0, 2] = np.nan
    return found


def column(table, name: str) -> list[str]:
    return list(next(column for column in table.columns if column.header == name).cells)


def test_a_head_seen_in_few_trials_stands_last_without_an_interval() -> None:
    scores = scores_of(seen_once())
    heads = scan_heads(scores, 10)
    assert [head["head"] for head in heads] == ["0-1", "0-0", "0-2"]
    assert [head["trials"] for head in heads] == [TRIALS, TRIALS, 1]
    assert heads[2]["ci_low"] is None and heads[2]["ci_high"] is None and heads[2]["active"] == 1
    json.dumps(heads, allow_nan=False)
    table = scan_table(scores, 10)
    assert column(table, "known in") == ["8 of 8", "8 of 8", "1 of 8"]
    assert column(table, "95 % interval")[2] == "too few trials"
    assert table.caption is None


def test_where_nothing_is_seen_the_tables_say_so() -> None:
    scores = scores_of(np.full((TRIALS, 1, 3), np.nan))
    assert scan_table(scores, 10).caption == NOT_SEEN and scan_heads(scores, 10) == []
    assert column(detectors_table(scores), "5 best heads")[0] == NOT_SEEN


def test_a_detector_shows_positive_heads_its_trials_and_of_how_many_it_shares() -> None:
    zero, negative = np.zeros((1, 3)), np.array([[-1.0, 0.0, -2.0]])
    scores = scores_of(seen_once(), wu_like=zero, below=negative, some=np.array([[0.0, 1.0, 0.0]]))
    scores.meta["trials_by_detector"]["some"] = 5
    table = detectors_table(scores)
    rows = dict(zip(column(table, "detector"), zip(*(c.cells for c in table.columns[1:]), strict=True), strict=True))
    assert rows["wu_like"] == ("none: zero for every head", "3 of 4")
    assert rows["below"][0] == "none: no head is above zero"
    assert rows["some (5 of 8 trials)"][0] == "L0H1"


def test_the_gate_table_shows_what_was_right() -> None:
    table = gate_table([Cell(400, 50.0, 4, 3)])
    assert column(table, "50 %") == ["3 of 4"]
