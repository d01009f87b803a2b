"""Suite "scan": trials per minute, several needles to a context beside one, and beside the public code.

Every pass is what a user starts: `locos_fast.scans.run.scan` with its default detectors, files and statistics included.
The public code runs the packed trials one by one; it also generates the answers. All take turns, round by round.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import rounds, scan_cases, scan_table
from benchmarks.measurements import (
    OVER,
    OVERLAP,
    PASSED,
    RATE,
    SPEARMAN,
    Absent,
    Measurement,
    Results,
)
from benchmarks.model_checks import Agreement
from benchmarks.public_pipeline import MOST_STEPS, PublicPipeline, PublicScorer, Unavailable
from benchmarks.rank_agreement import RankAgreement, rank_agreement
from benchmarks.scan_cases import ALONE, NEEDLES, PACKED, PUBLIC, SINGLE, ScanCase, ScanSubject, Trials, contexts
from benchmarks.suite import Refused, Suite
from benchmarks.terminal import console
from benchmarks.timing import synchronise
from benchmarks.trial_suite import TOLERANCE, gap
from locos_fast import LocosScorer, Trial
from locos_fast.models.foreign_errors import is_out_of_memory
from locos_fast.scans.attempt import Method
from locos_fast.scans.result import Scan, gate_rate
from locos_fast.scans.run import scan

ROUNDS = {False: 3, True: 2}  # quick or not
CHECKED = 3  # trials, before anything is timed


class Disagreement(RuntimeError):
    """The public code did not score the tokens that we score."""


class Timed(NamedTuple):
    """Seconds of every round, by provider, and what the scans of the first round found."""

    seconds: dict[str, list[float]]
    scans: dict[str, Scan]
    failed: dict[str, str]


def measure(options: Namespace) -> Iterator[Results]:
    """One length after another: check against the public code, then take turns."""
    lengths, needles, times = (
        contexts(quick=options.quick, only=options.context),
        NEEDLES[options.quick],
        ROUNDS[options.quick],
    )
    if not lengths:
        raise Refused("no case has this context; see benchmarks/scan_cases.py")
    try:
        subject = scan_cases.subject(options.device)
        scorer, commit, reason = _public(options, subject)
        for length in lengths:
            trials = subject.trials(length, needles)
            if scorer is not None:
                check(subject, trials.packed, scorer)
            case = subject.case(length, needles, len(trials.packed), commit)
            console.print(f"timing {case.label}, {times} rounds", highlight=False)
            yield results(take_turns(subject, trials, scorer, options.device, times), case, reason)
    except ValueError as error:  # a wheel is missing, or no trial counts
        raise Refused(str(error)) from error


def _public(options: Namespace, subject: ScanSubject) -> tuple[PublicScorer | None, str, str]:
    """The public code's scorer and commit, or why there is none."""
    try:
        public = PublicPipeline(options.public)
    except Unavailable as error:
        return None, "", str(error)
    return public.scorer(subject.model, subject.tokenizer), public.commit, ""


def check(subject: ScanSubject, trials: list[Trial], public: PublicScorer) -> None:
    """Compare the first trials' scores, on those on which the public code scores the same tokens; behind one shared
    beginning for ours. Raises Refused for other scores, and where there is nothing to compare."""
    comparable = []
    for trial in trials[:CHECKED]:
        try:
            own = as_the_public_code_scores(subject, trial)
            found = public.score(_prompt(subject, trial), trial.needle_span, trial.answer, steps=MOST_STEPS)
            if found.answer_steps != len(own.answer_ids) or not found.generated.startswith(trial.answer):
                raise Disagreement(f"it generated {found.generated!r}, and the answer is {trial.answer!r}")
            comparable.append((own, found))
        except Disagreement as error:
            console.print(f"not compared  {trial.id}: {error}", highlight=False, markup=False)
    if not comparable:
        raise Refused(f"the public code answers none of {CHECKED} trials, so that no scores can be compared")
    ours = LocosScorer(subject.model, subject.tokenizer).score_many([own for own, _ in comparable])
    gaps = [gap(scores, found) for scores, (_, found) in zip(ours, comparable, strict=True)]
    worst = float(np.max(gaps))  # NaN where one is
    agreement = Agreement(f"scores of the public code, {subject.name}, {len(ours)} trials", worst, TOLERANCE)
    console.print(f"{'ok' if agreement.passed else 'FAIL'}  {agreement}", highlight=False, markup=False)
    if not agreement.passed:
        raise Refused("the scores are not those of the public code")


def as_the_public_code_scores(subject: ScanSubject, trial: Trial) -> Trial:
    """The trial with the tokens in front of the answer's own ones, such as that of a space, moved into the prompt: the
    public code looks for the tokens of the answer's text alone. Raises Disagreement where they are others."""
    alone = subject.tokenizer.encode(trial.answer, add_special_tokens=False)
    first = len(trial.answer_ids) - len(alone)
    if first < 0 or trial.answer_ids[first:] != alone:
        raise Disagreement(f"the tokens of {trial.answer!r} are others behind this prompt")
    prompt = [*trial.prompt_ids, *trial.answer_ids[:first]]
    lead = trial.lead_tokens + first
    return replace(
        trial, prompt_ids=prompt, answer_ids=alone, length=len(prompt), lead_tokens=lead, foil=None, foil_ids=None
    )


def take_turns(subject: ScanSubject, trials: Trials, public: PublicScorer | None, device: str, times: int) -> Timed:
    """A scan of each kind and the public code, one after the other, `times` times. Raises ValueError if none of a
    scan's trials counts."""
    runs: dict[str, Callable[[], Scan | None]] = {
        SINGLE: partial(_scan, subject, trials.single),
        PACKED: partial(_scan, subject, trials.packed),
        ALONE: partial(_scan, subject, trials.single, share_prefixes=False),
    }
    if public is not None:
        runs[PUBLIC] = partial(_score_publicly, subject, trials.packed, public)
    _scan(subject, trials.packed[:1], gate=False)  # first-time costs; the public code's were paid by the check
    timed = Timed({}, {}, {})
    for _ in range(times):
        for name, run in list(runs.items()):
            rounds.release(device)
            synchronise(device)
            start = time.perf_counter()
            try:
                found = run()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                timed.failed[name] = "out of memory"
                del runs[name]
                continue
            synchronise(device)
            timed.seconds.setdefault(name, []).append(time.perf_counter() - start)
            if found is not None:
                timed.scans.setdefault(name, found)
    return timed


def _scan(subject: ScanSubject, trials: list[Trial], *, gate: bool = True, share_prefixes: bool = True) -> Scan:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "scan"
        return scan(
            subject.model, subject.tokenizer, trials, out, method=Method(gate=gate), share_prefixes=share_prefixes
        )


def _score_publicly(subject: ScanSubject, trials: list[Trial], public: PublicScorer) -> None:
    for trial in trials:
        public.score(_prompt(subject, trial), trial.needle_span, trial.answer, steps=MOST_STEPS)


def _prompt(subject: ScanSubject, trial: Trial) -> torch.Tensor:
    return torch.tensor([trial.prompt_ids], device=subject.model.device)


def results(timed: Timed, case: ScanCase, reason: str) -> Results:
    """Rates, how many times that of each provider the packed scan's is, gate rates, and agreement on the heads.

    reason: why the public code was not run.
    """
    measured = []
    for name, seconds in timed.seconds.items():
        measured.append(Measurement.of(name, RATE, [60 * case.trials / s for s in seconds], case))
    for name in (SINGLE, ALONE, PUBLIC):
        if name in timed.seconds and len(timed.seconds[name]) == len(timed.seconds.get(PACKED, [])):
            pairs = zip(timed.seconds[name], timed.seconds[PACKED], strict=True)
            measured.append(Measurement.of(name, OVER, [other / packed for other, packed in pairs], case))
    for name, found in timed.scans.items():
        measured.append(Measurement.of(name, PASSED, [gate_rate(found.cells) or 0.0], case))
    if (agreement := _agreement(timed)) is not None:
        measured.append(Measurement.of(PACKED, OVERLAP, [agreement.shared / agreement.best], case))
        measured.append(Measurement.of(PACKED, SPEARMAN, [agreement.spearman], case))
    absent = [Absent(name, case, why) for name, why in timed.failed.items()]
    if reason:
        absent.append(Absent(PUBLIC, case, reason))
    return Results(measured, absent)


def _agreement(timed: Timed) -> RankAgreement | None:
    if not {SINGLE, PACKED} <= timed.scans.keys():
        return None
    return rank_agreement(timed.scans[SINGLE].scores, timed.scans[PACKED].scores)


SUITE = Suite(
    name="scan",
    measure=measure,
    case_of=ScanCase.from_config,
    cells=scan_table.cells,
    goals=scan_table.judge,
    remarks=scan_table.remarks,
    panels=scan_table.panels,
)
