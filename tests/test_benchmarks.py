"""What the benchmarks promise: they time nothing that is wrong, and record everything they time. No timings here."""

import csv
import io
import json

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as benchmarks_main
from benchmarks import correctness, geometries, goals, measurements, memory, notes, pipeline, providers, results_table
from benchmarks.geometries import LONG, QWEN3_8B, SHORT, Case
from benchmarks.measurements import BANDWIDTH, MEMORY, TIME, Absent, Measurement
from benchmarks.problem import Problem
from benchmarks.results_table import Results
from locos_fast import ops

CASE = Case(QWEN3_8B, LONG, 8, torch.float32)
ON_CPU = [provider for provider in providers.PROVIDERS if provider.absent("cpu") is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", correctness.SMALL, ids=lambda geometry: geometry.name)
@pytest.mark.parametrize("provider", ON_CPU, ids=lambda provider: provider.name)
def test_provider_computes_the_definition(provider, geometry, dtype):
    problem = Problem(Case(geometry, 300, 3, dtype), "cpu")
    result = correctness.check(provider, problem, *correctness.bound(problem))
    assert result.passed, result


@pytest.mark.parametrize("geometry", correctness.SMALL, ids=lambda geometry: geometry.name)
def test_pipeline_equals_reference_term_by_term(geometry):
    problem = Problem(Case(geometry, 300, 3, torch.float32), "cpu")
    sums = ops.attention_contribution(
        problem.query,
        problem.key,
        problem.value,
        problem.direction,
        problem.spans,
        problem.visibility,
        backend="reference",
    )
    n = geometries.NEEDLE
    off_needle = (sums.total - sums.span[..., 0]) * (n / (sums.visible - n))[:, None]
    for l_plus, l_minus in (pipeline.from_queries(problem), pipeline.from_weights(problem)):
        # float32 sums of some 300 terms of size alpha * |w . v|, whose sum over the keys is of order 1
        torch.testing.assert_close(l_plus, sums.span[..., 0], atol=1e-6, rtol=0)
        torch.testing.assert_close(l_minus, off_needle, atol=1e-6, rtol=0)


def test_wrong_provider_fails_the_check():
    problem = Problem(Case(correctness.SMALL[0], 300, 3, torch.float32), "cpu")
    bound = correctness.bound(problem)
    assert not correctness.check(off_by(1.001), problem, *bound).passed
    assert not correctness.check(off_by(float("nan")), problem, *bound).passed


def test_provider_that_raises_fails_the_check():
    def run(problem):
        raise RuntimeError("no such kernel")

    problem = Problem(Case(correctness.SMALL[0], 300, 3, torch.float32), "cpu")
    broken = ON_CPU[0]._replace(run=run)
    result = correctness.check(broken, problem, *correctness.bound(problem))
    assert not result.passed
    assert "no such kernel" in result.error


def off_by(factor):
    """The pipeline with a wrong scale."""

    def run(problem):
        return providers.Terms(*(factor * term for term in pipeline.from_queries(problem)))

    return ON_CPU[0]._replace(run=run)


def test_failing_check_refuses_to_time(monkeypatch, tmp_path, capsys):
    def timed(*args, **kwargs):
        raise AssertionError("timed although a check failed")

    monkeypatch.setattr(correctness, "PROVIDERS", [off_by(2.0)])
    monkeypatch.setattr(benchmarks_main, "time_kernels", timed)
    assert benchmarks_main.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    assert "Nothing was timed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_rows_have_all_columns(tmp_path):
    rows = [
        Measurement.of("pipeline", TIME, [3.0, 1.0, 2.0], CASE),
        Measurement.of("pipeline", MEMORY, [4096], CASE),
        Measurement.of("memory.copy", BANDWIDTH, [1e10]),
    ]
    measurements.append(tmp_path, rows, "cpu")
    file = measurements.append(tmp_path, rows, "cpu")
    with file.open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == 2 * len(rows), "a second run is appended, with no second header"
    for row in table:
        assert list(row) == measurements.COLUMNS
        assert all(row.values())
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert json.loads(row["config"]) == (CASE.config if row["metric"] in (TIME, MEMORY) else {})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_row_of_every_planned_case_sees_the_whole_needle(device, quick):
    for case, _ in geometries.plan(device, quick=quick):
        start, end = case.needle
        assert end - start == geometries.NEEDLE
        assert case.first_key <= start, case
        assert end <= case.first_row, case
        window = case.geometry.window
        assert window is None or start > case.n_keys - 1 - window, case


def test_labels_tell_planned_cases_apart():
    for device in ("cpu", "cuda"):
        cases = [case for case, _ in geometries.plan(device, quick=False)]
        assert len({case.label for case in cases}) == len(cases)


def test_peak_counts_what_is_alive_at_once():
    assert memory.peak_of([(1, 100), (2, 50), (1, -100), (3, 80), (9, -1000)]) == 150


def test_peak_extra_of_a_known_call():
    def run():
        large = torch.ones(1 << 20)  # 4 MiB, alive with the result
        result = large + 1
        del large
        return result[:8].clone()

    assert memory.peak_extra(run, "cpu") == pytest.approx(8 << 20, rel=0.01)


@pytest.mark.parametrize(("seconds", "passed"), [(1.0, True), (1.3, False)])
def test_speed_goals_are_judged_against_the_pipeline(seconds, passed):
    results = Results(
        [
            Measurement.of("pipeline", TIME, [100.0], CASE),
            Measurement.of("torch.attention_contribution", TIME, [seconds], CASE),
        ],
        [],
    )
    (goal,) = goals.judge(results)
    assert goal.passed is passed, goal


@pytest.mark.parametrize(("long", "passed"), [(1_000_000, True), (1_100_000, False)])
def test_memory_goal_compares_two_contexts(long, passed):
    name = "torch.attention_summary"
    results = Results(
        [
            Measurement.of(name, MEMORY, [1_000_000], CASE._replace(n_keys=SHORT)),
            Measurement.of(name, MEMORY, [long], CASE),
        ],
        [],
    )
    (goal,) = goals.judge(results)
    assert goal.passed is passed, goal


def test_notes_get_the_table_between_the_marks(tmp_path):
    file = tmp_path / "NOTES.md"
    file.write_text("before\n<!-- cpu -->\nold\n<!-- /cpu -->\nafter\n")
    results = Results([Measurement.of("pipeline", TIME, [1.0], CASE)], [Absent("flex_attention", CASE, "no GPU")])
    for _ in range(2):
        notes.write(results, 1e10, ["PASS  a goal"], "cpu", file)
    text = file.read_text()
    assert text.startswith("before\n<!-- cpu -->\n")
    assert text.endswith("<!-- /cpu -->\nafter\n")
    assert "old" not in text
    assert text.count("| pipeline |") == 1
    assert "no GPU" in text
    with pytest.raises(ValueError, match="<!-- cuda -->"):
        notes.write(results, 1e10, [], "cuda", file)


def test_absent_providers_are_listed():
    timed = Measurement.of("pipeline", TIME, [1.0], CASE)
    missing = Absent("flex_attention", CASE, "flex_attention gives no log-sum-exp on a CPU")
    results = Results([timed], [missing])
    console = Console(file=io.StringIO(), width=200)
    console.print(results_table.results_table(results, 1e10, wall=False), *results_table.remarks(results))
    printed = console.file.getvalue()
    assert "flex_attention" in printed
    assert "no log-sum-exp" in printed
