"""What the model suite must reach on a GPU; elsewhere its figures are printed, and nobody judges them."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.goals import Goal
from benchmarks.measurements import MEMORY, OVERHEAD, TIME, Results
from benchmarks.model_cases import ModelCase
from benchmarks.model_providers import AGAIN, ATTRIBUTE, CHUNKED, SCORE
from benchmarks.units import GIB, gibibytes, percent

# tokens -> share of the forward pass that scoring, and attribution to 1,000 segments, may add
OVERHEADS = {8192: {SCORE: 0.01, ATTRIBUTE: 0.03}, 102_400: {SCORE: 0.001, ATTRIBUTE: 0.005}}
PEAKS = {102_400: 6 * GIB}  # bytes above the weights, in chunks
CHUNKING = 0.05  # share of the time that running in chunks may add


def judge(results: Results, device: str) -> list[Goal]:
    """A goal for every figure that has one, a plain figure for the rest."""
    judged = device == "cuda"
    found = []
    for case in results.cases:
        found += [*_overheads(results, case, judged), *_chunks(results, case, judged), *_peak(results, case, judged)]
    return found


def _overheads(results: Results, case: ModelCase, judged: bool) -> list[Goal]:
    floor = results.median(AGAIN, case, OVERHEAD)
    beside = "" if floor is None else f"; the forward pass against itself {percent(floor)}"
    found = []
    for provider in (SCORE, ATTRIBUTE):
        overhead = results.find(provider, case, OVERHEAD)
        if overhead is None:
            continue
        text = (
            f"{provider} adds {percent(overhead.p50)} ({percent(overhead.p20)} to {percent(overhead.p80)}) to the "
            f"forward pass{beside}"
        )
        wanted = OVERHEADS.get(case.n_tokens, {}).get(provider) if judged else None
        found.append(_goal(text, overhead.p50, wanted, percent, case))
    return found


def _chunks(results: Results, case: ModelCase, judged: bool) -> list[Goal]:
    share = results.ratio(CHUNKED, SCORE, case, TIME)
    if share is None or case.n_tokens - 1 <= case.token_chunk:  # such a prompt runs whole
        return []
    text = f"running {case.token_chunk} tokens at a time adds {percent(share - 1)} to the time of score_tokens"
    return [_goal(text, share - 1, CHUNKING if judged else None, percent, case)]


def _peak(results: Results, case: ModelCase, judged: bool) -> list[Goal]:
    peak = results.median(CHUNKED, case, MEMORY)
    if peak is None:
        return []
    text = f"peak memory above the weights, {case.token_chunk} tokens at a time: {gibibytes(peak)}"
    return [_goal(text, peak, PEAKS.get(case.n_tokens) if judged else None, gibibytes, case)]


def _goal(text: str, figure: float, wanted: float | None, unit: Callable[[float], str], case: ModelCase) -> Goal:
    limit = "" if wanted is None else f", at most {unit(wanted)}"
    return Goal(f"{text}{limit}: {case.label}", None if wanted is None else figure <= wanted)
