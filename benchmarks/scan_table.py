"""What the scan suite shows: rates, how many times as many trials a packed scan runs, and what that must reach."""

from __future__ import annotations

from benchmarks.goals import Goal
from benchmarks.measurements import OVER, OVERLAP, PASSED, RATE, SPEARMAN, Results
from benchmarks.scan_cases import ALONE, PACKED, PUBLIC, SINGLE, ScanCase
from benchmarks.suite import Cells, Panel, line
from benchmarks.units import times

PROVIDERS = (PUBLIC, ALONE, SINGLE, PACKED)
# times as many trials per minute with JUDGED needles to a context; single scans whose beginnings are shared compute
# half of each prompt on average, a packed one an eighth, so that no more than 4 is to be had there: shown, not judged
WANTED = {ALONE: 4.0, PUBLIC: 10.0}
JUDGED_NEEDLES, JUDGED_TOKENS = 8, range(1800, 2201)

TITLES = "provider,model,tokens,needles,trials,dtype,trials/min,p20,p80,packed is,p20,p80,answered".split(",")


def cells(results: Results, device: str) -> Cells:
    """A row per provider and case."""
    groups = [[_row(results, provider, case) for provider in PROVIDERS] for case in results.cases]
    return Cells("Trials per minute of a scan", TITLES, ("provider", "model", "dtype"), groups)


def _row(results: Results, provider: str, case: ScanCase) -> list[str]:
    needles = 1 if provider in (SINGLE, ALONE) else case.needles
    where = [provider, case.model, str(case.n_tokens), str(needles), str(case.trials), case.dtype]
    rate, over = (results.find(provider, case, metric) for metric in (RATE, OVER))
    if rate is None:
        return [*where, "absent"]
    passed = results.median(provider, case, PASSED)
    return [
        *where,
        *(f"{value:.3g}" for value in (rate.p50, rate.p20, rate.p80)),
        *([""] * 3 if over is None else map(times, (over.p50, over.p20, over.p80))),
        "" if passed is None else f"{passed:.0%}",
    ]


def judge(results: Results, device: str) -> list[Goal]:
    """Judged at about 2,000 tokens with eight needles; a figure that nobody judges elsewhere."""
    others = (SINGLE, ALONE, PUBLIC)
    return [goal for case in results.cases for provider in others for goal in _goal(results, provider, case)]


def _goal(results: Results, provider: str, case: ScanCase) -> list[Goal]:
    over = results.find(provider, case, OVER)
    judged = case.needles == JUDGED_NEEDLES and case.n_tokens in JUDGED_TOKENS
    wanted = WANTED.get(provider) if judged else None
    limit = "" if wanted is None else f", at least {times(wanted)}"
    if over is None:
        return [] if wanted is None else [Goal(f"{PACKED} over {provider}{limit}: not measured: {case.label}", None)]
    text = f"{PACKED} runs {times(over.p50)} ({times(over.p20)} to {times(over.p80)}) the trials of {provider}{limit}"
    return [Goal(f"{text}: {case.label}", None if wanted is None else over.p50 >= wanted)]


def remarks(results: Results, device: str) -> list[str]:
    commits = dict.fromkeys(case.public for case in results.cases if case.public)
    return [
        *(line for case in results.cases for line in agreement(results, case)),
        f"{PACKED}: all needles in one context; {SINGLE}: one in each, shared beginnings computed once; {ALONE}: the "
        "same trials without sharing",
        *(
            f"public: github.com/aryopg/locos at {commit}, called as it stands on the packed trials"
            for commit in commits
        ),
        "packed is: so many times the trials per minute, paired with the rate of the same round",
        *results.reasons,
    ]


def agreement(results: Results, case: ScanCase) -> list[str]:
    """Of the packed scan's heads with those of the other one; python -m benchmarks.rank_agreement has it of any two."""
    overlap, rank = (results.median(PACKED, case, metric) for metric in (OVERLAP, SPEARMAN))
    if overlap is None or rank is None:
        return []
    return [
        f"agreement of {PACKED} with {SINGLE}: {overlap:.0%} of the ten best heads, Spearman {rank:.3f}, over "
        f"{case.trials} trials each: {case.label}"
    ]


def panels(results: Results, device: str) -> list[Panel]:
    """The rate over the length, for each model."""
    found = []
    for model in dict.fromkeys(case.model for case in results.cases):
        points = [(case.n_tokens, case) for case in results.cases if case.model == model]
        lines = [line(results, provider, provider, RATE, points) for provider in PROVIDERS]
        found.append(Panel(model, "tokens in the prompt", "trials per minute", "/min", lines))
    return found
