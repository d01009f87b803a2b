"""What lies between the two events of the GPU benchmark: the launches of a layer, after reads of clean memory."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels_goals, providers, results_table, timing
from benchmarks.geometries import QWEN3_8B, Case
from benchmarks.measurements import BANDWIDTH, KERNELS, TIME, Measurement, Results
from benchmarks.problem import Problem
from locos_fast.ops import functions, triton_backend
from locos_fast.ops.backends import Backend
from locos_fast.ops.visibility import KeyCounts, Visibility
from tests.kernels.launch_counts import Operators, count_launches

CASE = Case(QWEN3_8B, 102_400, 8, torch.bfloat16)
TRITON = [provider for provider in providers.PROVIDERS if provider.kernels]


class Described(Problem):
    """The tensors of a case, without data."""

    def __init__(self, case):
        self.case, self.device = case, torch.device("meta")
        heads, kv_heads, dim = case.geometry.heads, case.geometry.kv_heads, case.geometry.head_dim
        self.query = self.described(heads, case.rows, dim)
        self.key, self.value = (self.described(kv_heads, case.n_keys, dim) for _ in range(2))
        self.direction = self.described(heads, case.rows, dim, dtype=torch.float32)
        self.attn = self.described(heads, case.rows, case.n_keys)
        self.visibility = Visibility.causal(torch.empty(case.rows, dtype=torch.int64, device="meta"))
        self.visible = torch.empty((1, case.rows), dtype=torch.int64, device="meta")
        self.counts = KeyCounts(self.visible, torch.empty((1, case.rows, 1), dtype=torch.int64, device="meta"))
        self.spans = [case.needle]

    def described(self, *shape, dtype=torch.bfloat16):
        return torch.empty((1, *shape), dtype=dtype, device="meta")


@pytest.mark.parametrize("provider", TRITON, ids=lambda provider: provider.name)
def test_a_timed_call_launches_what_a_layer_launches(provider, monkeypatch):
    """One fill and three kernels, or three kernels; the first call copies the table of spans."""
    launched = count_launches(monkeypatch)
    monkeypatch.setattr(
        functions, "backend_for", lambda backend, tensor: Backend("triton", triton_backend, plans_on_host=True)
    )
    problem = Described(CASE)
    provider.run(problem)
    launched.clear()
    with Operators(launched):
        provider.run(problem)
    assert tuple(name for name in launched if name != "fill") == provider.kernels
    expected = {"attention_contribution": 4, "attention_summary": 3, "ov_contribution": 3}
    assert len(launched) == expected[provider.name.removeprefix("triton.")], launched


def test_counts_of_a_problem_are_what_its_rows_see():
    problem = Problem(Case(QWEN3_8B, 300, 3, torch.float32), "cpu")
    assert problem.counts.visible.tolist() == problem.visible.tolist() == [[298, 299, 300]]
    assert problem.counts.span_visible.flatten().tolist() == [32, 32, 32]


def test_the_cache_is_flushed_by_writes_and_then_by_reads(monkeypatch):
    """Lines that were written last would go to memory while a kernel is timed."""

    class Buffer:
        def __init__(self, name):
            self.name = name

        def zero_(self):
            done.append(f"write {self.name}")

        def sum(self):
            done.append(f"read {self.name}")

    done = []
    monkeypatch.setattr(timing, "_flush_buffers", lambda: (Buffer("a"), Buffer("b")))
    timing.flush_cache()
    assert done == ["write a"] * timing.FLUSHES + ["read b"] * timing.READS
    assert timing.READS >= 1


def test_kernels_are_summed_call_by_call():
    timed = [("fill", 9.0), ("split", 1.0), ("combine", 0.5), ("fill", 9.0), ("split", 2.0), ("combine", 0.25)]
    assert timing.per_call(timed, ("split", "combine")) == [1.5, 2.25]


@pytest.mark.parametrize("timed", [[("split", 1.0)], [("split", 1.0), ("combine", 1.0), ("split", 2.0)], []])
def test_kernels_that_the_profiler_missed_give_no_time(timed):
    assert timing.per_call(timed, ("split", "combine")) == []


def test_the_bandwidth_goal_is_judged_on_the_kernels_alone():
    provider = next(p for p in TRITON if p.name == "triton.ov_contribution")
    seconds = provider.bytes_read(CASE) / 4e12
    measured = [
        Measurement.of(provider.name, TIME, [seconds / 0.5], CASE),
        Measurement.of(provider.name, KERNELS, [seconds / 0.95], CASE),
        Measurement.of(results_table.READ, BANDWIDTH, [4e12]),
    ]
    (goal,) = [goal for goal in kernels_goals.judge(Results(measured, []), "cuda") if "bandwidth" in goal.text]
    assert goal.passed and "95%" in goal.text


def test_the_kernels_alone_have_a_row_of_their_own():
    measured = [
        Measurement.of("triton.attention_summary", TIME, [80e-6], CASE),
        Measurement.of("triton.attention_summary", KERNELS, [60e-6], CASE),
    ]
    table = results_table.cells(Results(measured, []), "cuda")
    names = [row[0] for group in table.groups for row in group]
    assert names == ["triton.attention_summary *", "triton.attention_summary, kernels"]
    assert all(len(row) == len(table.titles) for group in table.groups for row in group)
