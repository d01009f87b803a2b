"""The timed cases, one pytest-benchmark group per case, one entry per provider.

    pytest benchmarks/bench_kernels.py --benchmark-only [--quick] [--device cuda] [--benchmark-compare]

`python -m benchmarks` runs this file after checking every provider, and adds memory, bandwidth and the results file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise

import pytest
import torch

from benchmarks import timing
from benchmarks.geometries import Case, plan
from benchmarks.problem import Problem
from benchmarks.providers import BASELINES, PROVIDERS, Provider, Task


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    planned = plan(
        config.getoption("device"),
        quick=config.getoption("quick"),
        geometries=config.getoption("geometry"),
        contexts=config.getoption("context"),
    )
    pairs = [
        (case, provider) for case, ours_only in planned for provider in PROVIDERS if provider.ours or not ours_only
    ]
    ids = [f"{case.label.replace(' ', '-')}-{provider.name}" for case, provider in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=ids)


@lru_cache(maxsize=1)
def problem_of(case: Case, device: str) -> Problem:
    """The tensors of the case at hand; those of the case before it are dropped."""
    return Problem(case, device)


def skip(item: pytest.Item, case: Case, provider: Provider, reason: str) -> None:
    """Skip, and leave in the report what `python -m benchmarks` lists as absent."""
    item.user_properties += [("case", case.label), ("provider", provider.name), ("reason", reason)]
    pytest.skip(reason)


class Turns:
    """Times of `others` before and after every round of their baseline, on a CPU.

    A round of the pipeline takes seconds, in which a machine that others use too grows faster or slower; the ratio of
    what was timed next to each other depends on that the least. What the pipeline frees, gigabytes, a virtual machine
    gives back to its host a second or two later, on the same cores: hence the pause.
    """

    CALLS, PAUSE = 5, 3  # seconds

    def __init__(self, others: Sequence[Provider], problem: Problem) -> None:
        self.others, self.problem = others, problem
        self.seconds: dict[str, list[float]] = {provider.name: [] for provider in others}

    def take(self) -> None:
        """One turn of each: the median of a few calls."""
        if self.others:
            time.sleep(self.PAUSE)
        for provider in self.others:
            calls = [timing.seconds(lambda run=provider.run: run(self.problem), "cpu") for _ in range(self.CALLS)]
            self.seconds[provider.name].append(statistics.median(calls))

    def ratios(self, baseline: Sequence[float]) -> dict[str, list[float]]:
        """Seconds of each round of the baseline over the mean of the turns before and after it."""
        return {
            name: [
                whole / ((before + after) / 2)
                for whole, (before, after) in zip(baseline, pairwise(seconds), strict=True)
            ]
            for name, seconds in self.seconds.items()
        }


@torch.inference_mode()
def test_kernel(benchmark, request: pytest.FixtureRequest, case: Case, provider: Provider) -> None:
    device = request.config.getoption("device")
    reason = provider.absent(device)
    benchmark.group = case.label
    if reason is not None:
        skip(request.node, case, provider, reason)
    problem = problem_of(case, device)

    def run() -> None:
        provider.run(problem)
        timing.synchronise(device)

    try:
        rounds = timing.rounds_for(run, device)
    except torch.OutOfMemoryError:
        skip(request.node, case, provider, "out of memory")
    benchmark.extra_info.update(provider=provider.name, case=case.label)
    if device == "cuda":
        call = partial(provider.run, problem)
        benchmark.extra_info["device_seconds"] = timing.device_seconds(call, rounds)
        benchmark.extra_info["kernel_seconds"] = timing.kernel_seconds(call, rounds, provider.kernels)
        benchmark.pedantic(run, setup=timing.start_cold, rounds=rounds)
        return
    compared = PROVIDERS if provider.name == BASELINES[Task.QUERIES] else ()
    others = [other for other in compared if other.ours and other.task is provider.task]
    turns = Turns([other for other in others if other.absent(device) is None], problem)
    benchmark.pedantic(run, setup=turns.take, rounds=rounds)
    if not benchmark.enabled:
        return
    turns.take()
    benchmark.extra_info["ratios"] = turns.ratios(benchmark.stats.stats.data)
