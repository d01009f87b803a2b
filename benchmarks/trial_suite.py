"""Suite "trial": scoring one example in one forward pass, beside the public code.

Both score the same answer tokens after the same prompt. The public code also finds the answer, by generating it; ours
is given it. On the planted model it runs two steps for an answer of one token: the second one ends the sequence.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import rounds
from benchmarks.measurements import MEMORY, RATIO, TIME, WALL, Absent, Measurement, Results
from benchmarks.model_checks import LAYERS, VOCABULARY, Agreement, distance
from benchmarks.models import OF_DEVICE
from benchmarks.public_pipeline import MOST_STEPS, PublicPipeline, PublicScorer, PublicScores, Unavailable
from benchmarks.suite import Cells, Panel, Refused, Suite, line
from benchmarks.terminal import console
from benchmarks.trial_cases import (
    STEPS,
    Example,
    Subject,
    TrialCase,
    contexts,
    planted_subject,
    random_subject,
    subjects,
)
from benchmarks.units import megabytes, milliseconds, times
from locos_fast import HeadScores, planted, score_tokens

OURS, PUBLIC = "score_tokens", "public"
BUDGET = {("cpu", True): 8.0, ("cpu", False): 20.0, ("cuda", True): 20.0, ("cuda", False): 30.0}  # seconds per case
CHECKED_TOKENS = 512
# of the largest score. In float32 an attention score of size s is off by some s * 2^-23: the planted model's are up to
# 79 in its retrieval heads and 441 in its positional heads, so that weights may be off by 1e-5 and 5e-5
TOLERANCE = 1e-4


class Disagreement(RuntimeError):
    """The public code did not score the answer that we score."""


def measure(options: Namespace) -> Iterator[Results]:
    """Check that both give the same scores, then time both in turns, one model and length after another."""
    lengths = contexts(options.device, quick=options.quick, only=options.context)
    if not lengths:
        raise Refused("no case has this context; see benchmarks/trial_cases.py")
    try:
        public = PublicPipeline(options.public)
    except Unavailable as error:
        public, reason = None, str(error)
    else:
        reason = ""
        if not all_agree(public, options.device):
            raise Refused("the scores are not those of the public code")
    for make in subjects(options.device):
        subject = make()
        for length in lengths:
            budget = BUDGET[options.device, options.quick]
            yield measure_case(subject, length, public, reason, options.device, budget=budget)
        del subject
        rounds.release(options.device)


def all_agree(public: PublicPipeline, device: str) -> bool:
    """In float32, on the planted model and on a small cut of the model with random weights."""
    cut = OF_DEVICE[device]._replace(layers=LAYERS, vocabulary=VOCABULARY, dtype=torch.float32)
    made = [planted_subject(device, kind) for kind in planted.KINDS] + [random_subject(cut, device)]
    agreements = []
    for subject in made:
        try:
            trial = prepare(subject, CHECKED_TOKENS, public)
            agreements.append(agreement(subject, trial))
        except Disagreement as error:
            console.print(f"FAIL  {subject.name}: {error}", highlight=False, markup=False)
            return False
    for found in agreements:
        console.print(f"{'ok' if found.passed else 'FAIL'}  {found}", highlight=False, markup=False)
    return all(found.passed for found in agreements)


def agreement(subject: Subject, trial: Prepared) -> Agreement:
    assert trial.scorer is not None
    what = f"scores of the public code, {subject.name}, {len(trial.example.answer_ids)} answer tokens"
    return Agreement(what, gap(run_ours(subject, trial), run_public(trial)), TOLERANCE)


def gap(ours: HeadScores, theirs: PublicScores) -> float:
    """Largest difference of a score, L+ or L-, as a share of the largest score; NaN where one is."""
    pairs = ((ours.score, theirs.score), (ours.l_plus, theirs.l_plus), (ours.l_minus, theirs.l_minus))
    scale = abs(theirs.score).max()
    return float(np.max([distance(own, other) * abs(other).max() / scale for own, other in pairs]))


class Prepared(NamedTuple):
    """An example whose answer is known, and what scores it with the public code."""

    example: Example
    scorer: PublicScorer | None


def prepare(subject: Subject, length: int, public: PublicPipeline | None) -> Prepared:
    """The example of a length. Where it has no answer: what the public code generates, or else random tokens."""
    example = subject.example(length)
    scorer = None if public is None else public.scorer(subject.model, subject.tokenizer)
    if example.answer_ids:
        return Prepared(example, scorer)
    if scorer is None:
        answer_ids = example.prompt_ids[0, -STEPS:].tolist()
    else:
        generated = scorer.score(example.prompt_ids, example.needle, "", steps=STEPS).generated
        answer_ids = subject.tokenizer.encode(generated)
    answer = subject.tokenizer.decode(answer_ids).strip()
    return Prepared(example._replace(answer_ids=answer_ids, answer=answer), scorer)


def run_ours(subject: Subject, trial: Prepared) -> HeadScores:
    prompt, answer_ids, needle = trial.example.prompt_ids, trial.example.answer_ids, trial.example.needle
    ids = torch.cat([prompt, torch.tensor([answer_ids], device=prompt.device)], dim=1)
    return score_tokens(subject.model, ids, needle, range(prompt.shape[1], ids.shape[1]))


def run_public(trial: Prepared) -> PublicScores:
    """Raises Disagreement if it scored another answer."""
    example = trial.example
    assert trial.scorer is not None
    steps = MOST_STEPS if trial.scorer.stop else len(example.answer_ids)  # where no token would end it
    found = trial.scorer.score(example.prompt_ids, example.needle, example.answer, steps=steps)
    if found.answer_steps != len(example.answer_ids):
        raise Disagreement(f"it generated {found.generated!r}, and the answer is {example.answer!r}")
    return found


def measure_case(
    subject: Subject, length: int, public: PublicPipeline | None, reason: str, device: str, *, budget: float
) -> Results:
    """Both at one length; without the public code, for a `reason`, ours alone."""
    commit = "" if public is None else public.commit
    try:
        trial = prepare(subject, length, public)
        if public is not None:
            run_public(trial)
    except (Disagreement, torch.OutOfMemoryError) as error:
        reason = str(error) if isinstance(error, Disagreement) else "out of memory"
        trial, public = prepare(subject, length, None), None
    case = subject.case(length, len(trial.example.answer_ids), commit)
    console.print(f"timing {case.label}", highlight=False)
    runs: dict[str, rounds.Run] = {OURS: partial(run_ours, subject, trial)}
    if public is not None:
        runs[PUBLIC] = partial(run_public, trial)
    absent = [] if public is not None else [Absent(PUBLIC, case, reason)]
    found = rounds.measure(runs, device, budget=budget)
    absent += [Absent(name, case, why) for name, why in found.failed.items()]
    measured = rounds.measurements(found, case, device)
    if OURS in found.time and PUBLIC in found.time:
        pairs = zip(found.time[PUBLIC], found.time[OURS], strict=True)
        measured.append(Measurement.of(OURS, RATIO, [theirs / own for theirs, own in pairs], case))
    return Results(measured, absent)


TITLES = "provider,model,tokens,answer,dtype,median,p20,p80,faster,p20,p80,extra memory,less".split(",")


def cells(results: Results, device: str) -> Cells:
    """Two rows per case; on a GPU with the wall time."""
    wall = device == "cuda"
    groups = [[_row(results, provider, case, wall) for provider in (PUBLIC, OURS)] for case in results.cases]
    title = "One scored example, beside the public code"
    return Cells(title, [*TITLES, "wall"] if wall else TITLES, ("provider", "model", "dtype"), groups)


def _row(results: Results, provider: str, case: TrialCase, wall: bool) -> list[str]:
    where = [provider, case.model, str(case.n_tokens), str(case.steps), case.dtype]
    seconds = results.find(provider, case, TIME)
    if seconds is None:
        return [*where, "absent"]
    ratio = results.find(provider, case, RATIO)
    row = [
        *where,
        *map(milliseconds, (seconds.p50, seconds.p20, seconds.p80)),
        *([""] * 3 if ratio is None else map(times, (ratio.p50, ratio.p20, ratio.p80))),
        megabytes(results.median(provider, case, MEMORY)),
        times(results.ratio(PUBLIC, OURS, case, MEMORY)) if provider == OURS else "",
    ]
    return [*row, milliseconds(results.median(provider, case, WALL))] if wall else row


def remarks(results: Results, device: str) -> list[str]:
    commits = dict.fromkeys(case.public for case in results.cases if case.public)
    return [
        *(f"public: github.com/aryopg/locos at {commit}, called as it stands" for commit in commits),
        "faster: paired with the public code's time of the same round",
        "the public code also generates the answer; score_tokens is given it",
        *results.reasons,
    ]


def panels(results: Results, device: str) -> list[Panel]:
    """Time and memory over the length, for each model."""
    found = []
    for model in dict.fromkeys(case.model for case in results.cases):
        points = [(case.n_tokens, case) for case in results.cases if case.model == model]
        for metric, y_label, unit in ((TIME, "time per example", "s"), (MEMORY, "extra memory", "B")):
            lines = [line(results, provider, provider, metric, points) for provider in (PUBLIC, OURS)]
            found.append(Panel(model, "tokens in the prompt", y_label, unit, lines))
    return found


SUITE = Suite(
    name="trial",
    measure=measure,
    case_of=TrialCase.from_config,
    cells=cells,
    goals=lambda results, device: [],
    remarks=remarks,
    panels=panels,
)
