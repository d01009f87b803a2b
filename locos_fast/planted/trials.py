"""The trials of a scan of the planted model: both kinds of questions over a grid of lengths and depths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from locos_fast.planted.model import KINDS, trial
from locos_fast.planted.vocabulary import CITIES, NAMES, TOKEN_IDS, ids
from locos_fast.prompts.needle_grid import spread, unreached, without_repeats
from locos_fast.prompts.scan_trials import LIMIT, ScanTrials, scan_grid
from locos_fast.prompts.trials import Trial

QUESTION_TOKENS = 3


def planted_trials(
    tokenizer: Any,
    kind: str | None = None,
    *,
    lengths: str | Sequence[int],
    depths: str | int | Sequence[float] | None = None,
    limit: int = LIMIT,
    seed: int = 0,
) -> ScanTrials:
    """At most `limit` trials for the planted model, spread evenly over lengths and depths; without a kind, literal or
    non_literal, every question comes in both.

    lengths, depths: see `locos_fast.prompts.scan_trials.scan_trials`. seed: of who and what is asked about.
    Raises ValueError, naming the argument, for another kind, a limit that leaves no trial, what is no grid, and a
    tokenizer that is not the planted model's.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"dataset: planted has the kinds {' and '.join(KINDS)}, got {kind!r}")
    if tokenizer.get_vocab() != TOKEN_IDS:
        raise ValueError(
            "dataset: planted is asked of the planted model alone, which `locos-fast planted FOLDER` writes"
        )
    kinds, grid = (kind,) if kind else KINDS, scan_grid(lengths, depths)
    if limit < len(kinds):
        raise ValueError(f"limit: expected at least {len(kinds)}, a trial of each kind, got {limit}")
    cells = spread(grid, limit // len(kinds), seed=seed)
    trials, notes = without_repeats(
        [
            with_foil(trial(length, each, depth=depth, seed=seed * limit + turn))
            for turn, (length, depth) in enumerate(cells)
            for each in kinds
        ]
    )
    config = {
        "dataset": "planted",
        "kinds": list(kinds),
        "contexts": "single",
        "needles_per_context": 1,
        "lengths": grid.lengths,
        "depths": grid.depths,
        "limit": limit,
        "chat_template": False,
        "seed": seed,
    }
    return ScanTrials(trials, config, [*notes, *unreached(trials, grid)])


def with_foil(asked: Trial) -> Trial:
    """A trial of the planted model with its question's tokens, and the next name or city as a wrong answer."""
    answers = NAMES if asked.answer in NAMES else CITIES
    foil = answers[(answers.index(asked.answer) + 1) % len(answers)]
    question = (asked.length - QUESTION_TOKENS, asked.length)
    return dataclasses.replace(asked, question_span=question, foil=foil, foil_ids=ids([foil]))
