"""python -m benchmarks: four suites. Each is checked, timed, printed, appended to its file of results and drawn.

kernels: the functions of locos_fast.ops on one attention layer, beside the per-step pipeline.
model:   what scoring adds to the forward pass of a whole model with random weights, in time and memory.
trial:   one scored example, beside the public LOCOS code, which you bring: --public DIR.
scan:    trials per minute of the built-in model, eight needles to a context, beside one and the public code.

On a GPU, in calls that should take under ten minutes each (estimated, not yet timed):
  --only kernels --geometry NAME    one for each geometry
  --only model --context 4096 8192 32768, then --context 102400, then --context 131072
  --only trial
  --only scan
then --report --notes, which needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import kernels_suite, machine, model_suite, notes, plots, results_file, scan_suite, trial_suite
from benchmarks.geometries import GEOMETRIES
from benchmarks.measurements import Results
from benchmarks.results_file import Origin
from benchmarks.suite import Refused, Suite
from benchmarks.terminal import console, table

HERE = Path(__file__).resolve().parent
SUITES = {suite.name: suite for suite in (kernels_suite.SUITE, model_suite.SUITE, trial_suite.SUITE, scan_suite.SUITE)}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    names = [geometry.name for geometry in GEOMETRIES]
    public = os.environ.get("LOCOS_PUBLIC")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--quick", action="store_true", help="few cases, minutes")
    parser.add_argument("--only", nargs="+", choices=list(SUITES), default=list(SUITES), help="which suites")
    parser.add_argument("--geometry", nargs="+", choices=names, metavar="NAME", help=f"kernels: {', '.join(names)}")
    parser.add_argument("--context", nargs="+", type=int, metavar="N", help="only these lengths, of those planned")
    parser.add_argument(
        "--public",
        type=Path,
        metavar="DIR",
        default=Path(public) if public else None,
        help="a clone of github.com/aryopg/locos, for the suites trial and scan; or LOCOS_PUBLIC in the environment",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of SUITE.csv and SUITE-DEVICE.png")
    parser.add_argument("--notes", action="store_true", help="also replace this device's tables in benchmarks/NOTES.md")
    parser.add_argument("--report", action="store_true", help="measure nothing: show the newest results in --out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every provider is correct and every goal met, else 1."""
    options = arguments(argv)
    suites = [SUITES[name] for name in dict.fromkeys(options.only)]
    if options.report:
        return 0 if all([report(suite, options) for suite in suites]) else 1
    if options.device == "cuda" and not torch.cuda.is_available():
        console.print("--device cuda: no CUDA or ROCm device here")
        return 1
    console.print(f"{machine.device_name(options.device)}; {machine.versions(options.device)}", highlight=False)
    return 0 if all([run(suite, options) for suite in suites]) else 1


def run(suite: Suite, options: argparse.Namespace) -> bool:
    """Measure, show, append and draw one suite; whether all is right and every goal met."""
    console.rule(suite.name)
    results, origin = Results([], []), Origin.here(options.device)
    try:
        for part in suite.measure(options):
            file = results_file.append(options.out, suite.name, part, origin)  # at once: a run may be cut off
            results.measurements.extend(part.measurements)
            results.absent.extend(part.absent)
    except Refused as error:
        console.print(f"Nothing was timed: {error}.", style="red", highlight=False, markup=False)
        return False
    passed = show(suite, results, options.device)
    console.print(f"Appended to {file}", highlight=False, markup=False)
    publish(suite, options)
    return passed


def report(suite: Suite, options: argparse.Namespace) -> bool:
    """Show and draw the newest results in the file, of one machine and commit; whether every goal is met."""
    console.rule(suite.name)
    found = results_file.latest(options.out, suite.name, options.device, suite.case_of)
    if found is None:
        console.print(f"no results of a {options.device} in {options.out / suite.name}.csv", highlight=False)
        return False
    results, origin = found
    console.print(str(origin), highlight=False, markup=False)
    passed = show(suite, results, options.device)
    publish(suite, options)
    return passed


def show(suite: Suite, results: Results, device: str) -> bool:
    """Print table, goals and remarks; whether every goal is met."""
    console.print(table(suite.cells(results, device)))
    goals = suite.goals(results, device)
    for text in [*map(str, goals), *suite.remarks(results, device)]:
        console.print(text, highlight=False, markup=False)
    return all(goal.passed is not False for goal in goals)


def publish(suite: Suite, options: argparse.Namespace) -> None:
    """Plot, and put in the notes, what all calls on the newest machine and commit have found together."""
    device = options.device
    found = results_file.latest(options.out, suite.name, device, suite.case_of)
    assert found is not None  # they were just written, or read
    results, origin = found
    panels = suite.panels(results, device)
    picture = plots.draw(panels, f"{suite.name}: {origin}", options.out / f"{suite.name}-{device}.png")
    console.print(f"Drawn in {picture}", highlight=False, markup=False)
    if options.notes:
        lines = [*map(str, suite.goals(results, device)), *suite.remarks(results, device)]
        notes.write(suite.name, device, str(origin), suite.cells(results, device), lines)


if __name__ == "__main__":
    sys.exit(main())
