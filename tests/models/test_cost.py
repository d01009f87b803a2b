"""What a scoring pass says that it cost."""

from __future__ import annotations

import time

import pytest
import torch

from locos_fast import score_tokens
from locos_fast.models import cost as cost_module
from locos_fast.models.cost import Cost, Meter, PeakMemory, Stopwatch
from locos_fast.report.tables import cost_line
from tests.oracles.threads import one_thread
from tests.oracles.tiny_models import build, tokens

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the wall clock, in seconds; write into it to let time pass."""
    now = [100.0]
    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: now[0])
    return now


def test_a_stopwatch_adds_up_and_counts_nothing_else(clock: list[float]) -> None:
    watch = Stopwatch()
    for _ in range(3):
        with watch.running(CPU):
            clock[0] += 2
        clock[0] += 5
    assert watch.seconds == 6


def test_a_stopwatch_survives_an_exception(clock: list[float]) -> None:
    watch = Stopwatch()
    with pytest.raises(RuntimeError, match="over"), watch.running(CPU):
        clock[0] += 2
        raise RuntimeError("over")
    assert watch.seconds == 2


def test_peak_memory_is_not_guessed_on_a_cpu() -> None:
    assert PeakMemory({CPU}).bytes() is None


@pytest.mark.parametrize("norm", ["none", "frozen"])
def test_scores_say_what_they_cost(norm: str) -> None:
    with one_thread():
        start = time.perf_counter()
        cost = score_tokens(build("llama"), tokens(1, 30), (4, 9), [28, 29], norm=norm).meta["cost"]
        whole = time.perf_counter() - start
    assert cost["scoring_seconds"] > 0
    assert cost["forward_seconds"] > 0
    assert cost["forward_seconds"] + cost["scoring_seconds"] <= whole
    assert cost["overhead"] == pytest.approx(cost["scoring_seconds"] / cost["forward_seconds"])
    assert cost["peak_memory_bytes"] is None  # on a CPU


def test_the_forward_pass_is_the_rest_of_the_pass(clock: list[float]) -> None:
    meter = Meter(build("llama"))
    clock[0] += 30
    with meter.scoring.running(CPU):
        clock[0] += 3
    cost = meter.cost()
    assert (cost.forward_seconds, cost.scoring_seconds, cost.overhead) == (30, 3, 0.1)


def test_a_cost_is_one_line() -> None:
    cost = Cost(forward_seconds=2.0, scoring_seconds=0.01, peak_memory_bytes=3 * 2**30)
    assert cost_line(cost.as_dict()) == (
        "forward 2 s, scoring 0.01 s (0.50% of the forward), peak memory 3 GiB above what was in use before"
    )
    assert cost_line(cost._replace(peak_memory_bytes=None).as_dict()).endswith("peak memory not measured on a CPU")


@pytest.mark.gpu
def test_a_gpu_is_timed_by_events_and_its_allocator() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    watch, memory = Stopwatch(), PeakMemory({x.device})
    with watch.running(device):
        for _ in range(20):
            x @ x
    assert watch.seconds > 1e-4
    assert memory.bytes() >= x.nbytes
