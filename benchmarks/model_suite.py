"""Suite "model": what scoring adds to the forward pass of a whole model, in time and in memory."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

from transformers import PreTrainedModel

from benchmarks import model_checks, model_goals, rounds
from benchmarks.measurements import MEMORY, OVERHEAD, TIME, WALL, Absent, Measurement, Results
from benchmarks.model_cases import ROWS, ModelCase, plan
from benchmarks.model_providers import FORWARD, PROVIDERS
from benchmarks.models import OF_DEVICE, build, tokens
from benchmarks.suite import Cells, Panel, Refused, Suite, line
from benchmarks.terminal import console
from benchmarks.units import gibibytes, milliseconds, percent

BUDGET = {("cpu", True): 12.0, ("cpu", False): 40.0, ("cuda", True): 60.0, ("cuda", False): 120.0}  # seconds per case


def measure(options: Namespace) -> Iterator[Results]:
    """Check a cut of the model, then time every provider in turns, one length after another."""
    cases = plan(options.device, quick=options.quick, contexts=options.context)
    if not cases:
        raise Refused("no case has this context; see benchmarks/model_cases.py")
    if not all_agree(options.device):
        raise Refused("scoring does not give the same by every path")
    model = build(cases[0].shape, options.device)
    for case in cases:
        console.print(f"timing {case.label}", highlight=False)
        yield measure_case(model, case, options.device, budget=BUDGET[options.device, options.quick])


def all_agree(device: str) -> bool:
    agreements = list(model_checks.check(OF_DEVICE[device], device))
    for agreement in agreements:
        console.print(f"{'ok' if agreement.passed else 'FAIL'}  {agreement}", highlight=False, markup=False)
    rounds.release(device)
    return all(agreement.passed for agreement in agreements)


def measure_case(model: PreTrainedModel, case: ModelCase, device: str, *, budget: float) -> Results:
    """Every provider at one length; `budget` in seconds."""
    ids = tokens(case.shape, case.n_tokens, device)
    runs = {provider.name: partial(provider.run, model, ids, case) for provider in PROVIDERS}
    found = rounds.measure(runs, device, budget=budget)
    return Results(
        [*rounds.measurements(found, case, device), *overheads(found, case)],
        [Absent(name, case, reason) for name, reason in found.failed.items()],
    )


def overheads(found: rounds.Rounds, case: ModelCase) -> list[Measurement]:
    """What each provider added to the forward pass of the same round, as a share of it."""
    bare = found.time.get(FORWARD)
    if bare is None:
        return []
    return [
        Measurement.of(name, OVERHEAD, [own / base - 1 for own, base in zip(seconds, bare, strict=True)], case)
        for name, seconds in found.time.items()
        if name != FORWARD
    ]


TITLES = ["provider", "model", "tokens", "median", "p20", "p80", "overhead", "p20", "p80", "peak above weights"]


def cells(results: Results, device: str) -> Cells:
    """A row per provider; on a GPU with the wall time."""
    wall = device == "cuda"
    groups = [[_row(results, provider.name, case, wall) for provider in PROVIDERS] for case in results.cases]
    title = f"One pass over a model with random weights, {ROWS} answer steps"
    return Cells(title, [*TITLES, "wall"] if wall else TITLES, ("provider", "model"), groups)


def _row(results: Results, provider: str, case: ModelCase, wall: bool) -> list[str]:
    where = [provider, case.shape.name, str(case.n_tokens)]
    seconds = results.find(provider, case, TIME)
    if seconds is None:
        return [*where, "absent"]
    overhead = results.find(provider, case, OVERHEAD)
    row = [
        *where,
        *map(milliseconds, (seconds.p50, seconds.p20, seconds.p80)),
        *([""] * 3 if overhead is None else map(percent, (overhead.p50, overhead.p20, overhead.p80))),
        gibibytes(results.median(provider, case, MEMORY)),
    ]
    return [*row, milliseconds(results.median(provider, case, WALL))] if wall else row


def remarks(results: Results, device: str) -> list[str]:
    return [
        "overhead: paired with the forward pass of the same round",
        *(f"{provider.name}: {provider.remark}" for provider in PROVIDERS if provider.remark),
        *results.reasons,
    ]


def panels(results: Results, device: str) -> list[Panel]:
    """Overhead and peak memory over the length."""
    points = [(case.n_tokens, case) for case in results.cases]
    shape = results.cases[0].shape.name
    names = [provider.name for provider in PROVIDERS]
    added = [line(results, name, name, OVERHEAD, points) for name in names]
    memory = [line(results, name, name, MEMORY, points) for name in names]
    return [
        Panel(shape, "tokens", "time beyond the forward pass, as a share of it", "%", added),
        Panel(shape, "tokens", "peak memory above the weights", "B", memory),
    ]


SUITE = Suite(
    name="model",
    measure=measure,
    case_of=ModelCase.from_config,
    cells=cells,
    goals=model_goals.judge,
    remarks=remarks,
    panels=panels,
)
