"""The timed cases, one pytest-benchmark group per case, one entry per provider.

    pytest benchmarks/bench_kernels.py --benchmark-only [--quick] [--device cuda] [--benchmark-compare]

`python -m benchmarks` runs this file after checking every provider, and adds memory, bandwidth and the results file.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from benchmarks import timing
from benchmarks.geometries import Case, plan
from benchmarks.problem import Problem
from benchmarks.providers import PROVIDERS, Provider


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
        benchmark.extra_info["device_seconds"] = timing.device_seconds(lambda: provider.run(problem), rounds)
    benchmark.pedantic(run, setup=timing.start_cold if device == "cuda" else None, rounds=rounds)
