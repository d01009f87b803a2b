"""python -m benchmarks: check, time, measure memory and bandwidth, print one table, append to the results file."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import track

from benchmarks import bandwidth, correctness, machine, measurements, memory, notes
from benchmarks.geometries import Case, Planned, plan
from benchmarks.goals import judge
from benchmarks.measurements import BANDWIDTH, MEMORY, TIME, WALL, Absent, Measurement
from benchmarks.problem import Problem
from benchmarks.providers import PROVIDERS
from benchmarks.results_table import Results, remarks, results_table

HERE = Path(__file__).resolve().parent
console = Console(width=None if sys.stdout.isatty() else 180)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--quick", action="store_true", help="one geometry, minutes")
    parser.add_argument("--only", choices=("kernels",), default="kernels", help="which suite")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of kernels.csv")
    parser.add_argument("--notes", action="store_true", help="also replace this device's table in benchmarks/NOTES.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every provider is correct and every goal met, else 1."""
    options = arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        console.print("--device cuda: no CUDA or ROCm device here")
        return 1
    planned = plan(options.device, quick=options.quick)
    console.print(f"{machine.device_name(options.device)}; {machine.versions(options.device)}", highlight=False)
    if not all_correct(options.device, planned):
        console.print("[red]Nothing was timed: a provider does not compute the definition.[/red]")
        return 1
    results = time_kernels(options.device, planned, quick=options.quick)
    if results is None:
        console.print("[red]pytest failed: see above.[/red]")
        return 1
    rates = bandwidth.measure(options.device)
    results = results._replace(measurements=[*results.measurements, *peak_memory(options.device, results)])
    machine_rates = [
        Measurement.of("memory.copy", BANDWIDTH, rates.copy),
        Measurement.of("memory.read", BANDWIDTH, rates.read),
    ]
    file = measurements.append(options.out, [*results.measurements, *machine_rates], options.device)
    console.print(results_table(results, rates.best_read, wall=options.device == "cuda"))
    goals = judge(results)
    conclusions = [*map(str, goals), rates.summary()]
    for line in [*conclusions, *remarks(results), f"Appended to {file}"]:
        console.print(line, highlight=False, markup=False)
    if options.notes:
        notes.write(results, rates.best_read, conclusions, options.device)
    return 0 if all(goal.passed for goal in goals) else 1


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


def time_kernels(device: str, planned: Sequence[Planned], *, quick: bool) -> Results | None:
    """Run bench_kernels.py; None if pytest fails."""
    skips = Skips()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        flags = ["--benchmark-only", f"--benchmark-json={file}", "--benchmark-quiet", f"--device={device}"]
        flags += ["--quick"] if quick else []
        paths = [str(HERE / "bench_kernels.py"), f"--rootdir={HERE.parent}"]  # callable from any folder
        if pytest.main([*paths, "-q", "--disable-warnings", "-rN", *flags], plugins=[skips]) != pytest.ExitCode.OK:
            return None
        entries = json.loads(file.read_text())["benchmarks"]
    cases = {case.label: case for case, _ in planned}
    timed = [measurement for entry in entries for measurement in times_of(entry, device, cases)]
    return Results(timed, [Absent(skip["provider"], cases[skip["case"]], skip["reason"]) for skip in skips.found])


def times_of(entry: dict, device: str, cases: dict[str, Case]) -> list[Measurement]:
    """One entry of pytest-benchmark's file; `cases` by label."""
    info, wall = entry["extra_info"], entry["stats"]["data"]
    case, provider = cases[info["case"]], info["provider"]
    if device == "cpu":
        return [Measurement.of(provider, TIME, wall, case)]
    return [
        Measurement.of(provider, TIME, info["device_seconds"], case),
        Measurement.of(provider, WALL, wall, case),
    ]


@torch.inference_mode()
def peak_memory(device: str, results: Results) -> list[Measurement]:
    """The peak extra memory of everything that was timed."""
    found = []
    for case in track(results.cases, "peak memory", console=console, transient=True):
        problem = Problem(case, device)
        for prepared in ("attn", "output", "row_mask"):  # inputs, which are not the provider's memory
            getattr(problem, prepared)
        for provider in PROVIDERS:
            if results.median(provider.name, case, TIME) is not None:
                peak = memory.peak_extra(partial(provider.run, problem), device)
                found.append(Measurement.of(provider.name, MEMORY, [peak], case))
    return found


if __name__ == "__main__":
    sys.exit(main())
