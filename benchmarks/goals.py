"""What a run must reach: lines of pass or fail."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.geometries import LONG, QWEN3_8B, SHORT, USUAL_ROWS, Case
from benchmarks.measurements import MEMORY
from benchmarks.providers import PROVIDERS
from benchmarks.results_table import Results, megabytes, times

SPEEDUPS = {"torch.attention_contribution": 80, "torch.attention_summary": 160}  # float32 on two CPU cores


class Goal(NamedTuple):
    text: str
    passed: bool

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.text}"


def judge(results: Results) -> list[Goal]:
    """The goals that the cases of this run can decide."""
    return [*_speed(results), *_memory(results)]


def _speed(results: Results) -> list[Goal]:
    goals = []
    case = Case(QWEN3_8B, LONG, USUAL_ROWS, torch.float32)
    for provider in PROVIDERS:
        speedup = results.speedup(provider, case)
        if provider.name in SPEEDUPS and speedup is not None:
            wanted = SPEEDUPS[provider.name]
            text = f"{provider.name} is {times(speedup)} as fast as the pipeline, at least {wanted}x: {case.label}"
            goals.append(Goal(text, speedup >= wanted))
    return goals


def _memory(results: Results) -> list[Goal]:
    """Where a provider ran two contexts, its extra memory is the same to within 1 %."""
    goals = []
    for case in results.cases:
        short = case._replace(n_keys=SHORT)
        for provider in PROVIDERS:
            long_bytes = results.median(provider.name, case, MEMORY)
            short_bytes = results.median(provider.name, short, MEMORY)
            if case == short or not provider.constant_memory or long_bytes is None or short_bytes is None:
                continue
            text = (
                f"extra memory of {provider.name} does not depend on N: {megabytes(short_bytes)} at {SHORT}, "
                f"{megabytes(long_bytes)} at {case.n_keys}, {case.dtype_name}"
            )
            goals.append(Goal(text, abs(long_bytes - short_bytes) <= 0.01 * short_bytes))
    return goals
