"""Suite "kernels": the functions of `locos_fast.ops` on one attention layer, compared with the per-step pipeline."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.progress import track

from benchmarks import bandwidth, correctness, kernels_goals, memory, results_table
from benchmarks.geometries import USUAL_ROWS, Case, Planned, plan
from benchmarks.measurements import BANDWIDTH, KERNELS, MEMORY, RATIO, TIME, WALL, Absent, Measurement, Results
from benchmarks.problem import Problem
from benchmarks.providers import PROVIDERS
from benchmarks.suite import Panel, Refused, Suite, line
from benchmarks.terminal import console

HERE = Path(__file__).resolve().parent


def measure(options: Namespace) -> Iterator[Results]:
    """Check every provider, time all of them, measure memory and bandwidth; all in one part."""
    planned = plan(options.device, quick=options.quick, geometries=options.geometry, contexts=options.context)
    if not planned:
        raise Refused("no case has this geometry and context; see benchmarks/geometries.py")
    if not all_correct(options.device, planned):
        raise Refused("a provider does not compute the definition")
    results = time_kernels(options, planned)
    if results is None:
        raise Refused("pytest failed: see above")
    found = [*results.measurements, *peak_memory(options.device, results)]
    rates = bandwidth.measure(options.device)
    found.append(Measurement.of(results_table.COPY, BANDWIDTH, rates.copy))
    found.append(Measurement.of(results_table.READ, BANDWIDTH, rates.read))
    yield results._replace(measurements=found)


def all_correct(device: str, planned: Sequence[Planned]) -> bool:
    """Whether every provider agrees with float64 on small cases, in every dtype that is to be timed."""
    checks = list(correctness.check_all(device, dict.fromkeys(case.dtype for case, _ in planned)))
    for check in checks:
        if not check.passed:
            problem = check.error or f"{check.worst:.3g} times the allowed error"
            console.print(f"FAIL  {check.provider}: {problem}, {check.case.label}", style="red", markup=False)
    right = sum(check.passed for check in checks)
    console.print(f"{right} of {len(checks)} correctness checks against float64 passed")
    return right == len(checks)


class Skips:
    """A pytest plugin that collects what was skipped and why."""

    def __init__(self) -> None:
        self.found: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.skipped:
            self.found.append(dict(report.user_properties))


def time_kernels(options: Namespace, planned: Sequence[Planned]) -> Results | None:
    """Run bench_kernels.py; None if pytest fails."""
    skips = Skips()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        flags = ["--benchmark-only", f"--benchmark-json={file}", "--benchmark-quiet", f"--device={options.device}"]
        flags += ["--quick"] if options.quick else []
        flags += [f"--geometry={name}" for name in options.geometry or ()]
        flags += [f"--context={tokens}" for tokens in options.context or ()]
        paths = [str(HERE / "bench_kernels.py"), f"--rootdir={HERE.parent}"]  # callable from any folder
        if pytest.main([*paths, "-q", "--disable-warnings", "-rN", *flags], plugins=[skips]) != pytest.ExitCode.OK:
            return None
        entries = json.loads(file.read_text())["benchmarks"]
    cases = {case.label: case for case, _ in planned}
    timed = [measurement for entry in entries for measurement in times_of(entry, options.device, cases)]
    return Results(timed, [Absent(skip["provider"], cases[skip["case"]], skip["reason"]) for skip in skips.found])


def times_of(entry: dict, device: str, cases: dict[str, Case]) -> list[Measurement]:
    """One entry of pytest-benchmark's file; `cases` by label."""
    info, wall = entry["extra_info"], entry["stats"]["data"]
    case, provider = cases[info["case"]], info["provider"]
    if device == "cpu":
        ratios = info["ratios"].items()  # of the providers compared with this one
        return [
            Measurement.of(provider, TIME, wall, case),
            *(Measurement.of(other, RATIO, found, case) for other, found in ratios),
        ]
    found = [
        Measurement.of(provider, TIME, info["device_seconds"], case),
        Measurement.of(provider, WALL, wall, case),
    ]
    if info["kernel_seconds"]:
        found.append(Measurement.of(provider, KERNELS, info["kernel_seconds"], case))
    return found


@torch.inference_mode()
def peak_memory(device: str, results: Results) -> list[Measurement]:
    """The peak extra memory of everything that was timed."""
    found = []
    for case in track(results.cases, "peak memory", console=console, transient=True):
        problem = Problem(case, device)
        for prepared in (
            "attn",
            "output",
            "row_mask",
            "visible",
            "counts",
        ):  # inputs, which are not the provider's memory
            getattr(problem, prepared)
        for provider in PROVIDERS:
            if results.median(provider.name, case, TIME) is not None:
                peak = memory.peak_extra(partial(provider.run, problem), device)
                found.append(Measurement.of(provider.name, MEMORY, [peak], case))
    return found


def panels(results: Results, device: str) -> list[Panel]:
    """Time and extra memory over the context, at the usual rows, of the first geometry in each dtype."""
    geometry = results.cases[0].geometry
    found = []
    for dtype in dict.fromkeys(case.dtype for case in results.cases):
        cases = [
            case for case in results.cases if (case.geometry, case.rows, case.dtype) == (geometry, USUAL_ROWS, dtype)
        ]
        points = [(case.n_keys, case) for case in cases]
        where = f"{geometry.name}, {USUAL_ROWS} answer steps, {str(dtype).removeprefix('torch.')}"
        for metric, y_label, unit in ((TIME, "time per layer", "s"), (MEMORY, "extra memory", "B")):
            lines = [line(results, provider.name, provider.name, metric, points) for provider in PROVIDERS]
            found.append(Panel(where, "keys", y_label, unit, lines))
    return found


SUITE = Suite(
    name="kernels",
    measure=measure,
    case_of=Case.from_config,
    cells=results_table.cells,
    goals=kernels_goals.judge,
    remarks=results_table.remarks,
    panels=panels,
)
