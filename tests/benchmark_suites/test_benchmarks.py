"""What the benchmarks promise: they time nothing that is wrong, and record everything they time. No timings here."""

import subprocess

import pytest
import torch

from benchmarks import __main__ as benchmarks_main
from benchmarks import (
    correctness,
    geometries,
    kernels_goals,
    kernels_suite,
    machine,
    memory,
    pipeline,
    providers,
    results_table,
)
from benchmarks.bench_kernels import Turns
from benchmarks.geometries import LONG, MIDDLE, QWEN3_8B, SHORT, Case
from benchmarks.measurements import BANDWIDTH, KERNELS, MEMORY, RATIO, TIME, Measurement, Results
from benchmarks.problem import Problem
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
        return [factor * term for term in pipeline.from_queries(problem)]

    return ON_CPU[0]._replace(run=run)


def test_failing_check_refuses_to_time(monkeypatch, tmp_path, capsys):
    def timed(*args, **kwargs):
        raise AssertionError("timed although a check failed")

    monkeypatch.setattr(correctness, "PROVIDERS", [off_by(2.0)])
    monkeypatch.setattr(kernels_suite, "time_kernels", timed)
    assert benchmarks_main.main(["--device", "cpu", "--quick", "--only", "kernels", "--out", str(tmp_path)]) == 1
    assert "Nothing was timed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


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


def cuda_case(n_keys, rows=8, geometry=QWEN3_8B):
    return Case(geometry, n_keys, rows, torch.bfloat16)


def test_plan_of_a_gpu_covers_every_context_and_number_of_rows():
    planned = geometries.plan("cuda", quick=False, geometries=["Qwen3-8B"])
    assert {(case.n_keys, case.rows) for case, _ in planned} == {
        (n_keys, rows) for n_keys in (4096, 8192, 32_768, 102_400, 262_144, 524_288) for rows in (1, 8, 32, 64)
    }
    everyone = {(case.n_keys, case.rows) for case, ours_only in planned if not ours_only}
    assert everyone == {(n, 8) for n in geometries.CONTEXTS} | {(102_400, rows) for rows in geometries.ROWS}


def test_plan_is_cut_by_geometry_and_context():
    planned = geometries.plan("cuda", quick=False, geometries=["gpt-oss-20b"], contexts=[4096])
    assert {(case.geometry.name, case.n_keys) for case, _ in planned} == {("gpt-oss-20b", 4096)}


def test_config_read_backwards_is_the_case():
    for device in ("cpu", "cuda"):
        for case, _ in geometries.plan(device, quick=False):
            assert Case.from_config(case.config) == case


@pytest.mark.parametrize(
    ("device", "dtype", "function", "wanted"),
    [
        ("cpu", torch.float32, "torch.attention_contribution", 100),
        ("cpu", torch.float32, "torch.attention_summary", 200),
        ("cpu", torch.bfloat16, "torch.attention_summary", 50),
        ("cuda", torch.bfloat16, "triton.attention_contribution", 50),
        ("cuda", torch.bfloat16, "triton.attention_summary", 100),
    ],
)
def test_speed_goals_are_judged_against_the_pipeline(device, dtype, function, wanted):
    case = Case(QWEN3_8B, LONG, 8, dtype)
    for factor, passed in ((1.01, True), (0.99, False)):
        measured = [
            Measurement.of("pipeline", TIME, [1.0], case),
            Measurement.of(function, TIME, [1 / (factor * wanted)], case),
        ]
        (goal,) = [goal for goal in kernels_goals.judge(Results(measured, []), device) if "as fast" in goal.text]
        assert goal.passed is passed, goal
        assert f"at least {wanted}x" in goal.text


def test_speed_on_a_cpu_is_shown_at_32k_and_judged_at_100k():
    case = CASE._replace(n_keys=MIDDLE)
    measured = [
        Measurement.of("pipeline", TIME, [1.0], case),
        Measurement.of("torch.attention_summary", TIME, [1.0], case),
    ]
    (goal,) = kernels_goals.judge(Results(measured, []), "cpu")
    assert "1x as fast" in goal.text
    assert goal.passed is None


def test_turns_compare_what_was_timed_next_to_each_other():
    turns = Turns([], Problem(Case(QWEN3_8B, 64, 1, torch.float32), "cpu"))
    turns.seconds = {"torch.attention_summary": [1.0, 3.0, 5.0]}  # the machine grows slower
    assert turns.ratios([200.0, 400.0]) == {"torch.attention_summary": [100.0, 100.0]}


def test_ratios_by_turns_are_what_is_judged():
    measured = [
        Measurement.of("pipeline", TIME, [1000.0], CASE),
        Measurement.of("torch.attention_summary", TIME, [1.0], CASE),
        Measurement.of("torch.attention_summary", RATIO, [199.0], CASE),
    ]
    (goal,) = kernels_goals.judge(Results(measured, []), "cpu")
    assert goal.text.startswith("torch.attention_summary is 199x as fast as the pipeline")
    assert not goal.passed


@pytest.mark.parametrize(("long", "passed"), [(1_000_000, True), (1_100_000, False)])
def test_memory_goal_compares_two_contexts(long, passed):
    name = "torch.attention_summary"
    measured = [
        Measurement.of(name, MEMORY, [1_000_000], CASE._replace(n_keys=SHORT)),
        Measurement.of(name, MEMORY, [long], CASE),
    ]
    (goal,) = kernels_goals.judge(Results(measured, []), "cpu")
    assert goal.passed is passed, goal


@pytest.mark.parametrize(("share", "passed"), [(0.0099, True), (0.0101, False)])
def test_memory_goal_is_a_share_of_the_pipeline(share, passed):
    measured = [
        Measurement.of("pipeline", MEMORY, [1e9], CASE),
        Measurement.of("torch.attention_contribution", MEMORY, [share * 1e9], CASE),
    ]
    (goal,) = kernels_goals.judge(Results(measured, []), "cpu")
    assert goal.passed is passed, goal


@pytest.mark.parametrize(
    ("geometry", "rows", "share", "passed"),
    [
        (QWEN3_8B, 8, 0.91, True),  # 32 rows per key/value head
        (QWEN3_8B, 8, 0.89, False),
        (QWEN3_8B, 1, 0.89, False),
        (geometries.GEOMETRIES[2], 8, 0.81, True),  # 64
        (geometries.GEOMETRIES[2], 8, 0.79, False),
        (QWEN3_8B, 32, 0.1, None),  # 128: not judged
    ],
)
def test_bandwidth_goal_depends_on_the_rows_of_a_kv_head(geometry, rows, share, passed):
    case, read = cuda_case(102_400, rows, geometry), 4e12
    provider = next(p for p in providers.PROVIDERS if p.name == "triton.attention_contribution")
    seconds = provider.bytes_read(case) / (share * read)
    measured = [
        Measurement.of(provider.name, KERNELS, [seconds], case),
        Measurement.of(results_table.COPY, BANDWIDTH, [0.9 * read]),
        Measurement.of(results_table.READ, BANDWIDTH, [read]),
    ]
    goals = kernels_goals.judge(Results(measured, []), "cuda")
    assert [goal.passed for goal in goals] == ([] if passed is None else [passed]), goals


@pytest.mark.parametrize(
    ("n_keys", "share", "passed"),
    [(32_768, 0.9, None), (102_400, 0.59, True), (102_400, 0.61, False), (262_144, 0.54, True), (524_288, 0.56, False)],
)
def test_summary_goal_compares_with_contribution(n_keys, share, passed):
    case = cuda_case(n_keys)
    measured = [
        Measurement.of("triton.attention_contribution", TIME, [1.0], case),
        Measurement.of("triton.attention_summary", TIME, [share], case),
    ]
    goals = kernels_goals.judge(Results(measured, []), "cuda")
    assert [goal.passed for goal in goals] == ([] if passed is None else [passed]), goals


def test_sums_from_log_sum_exp_are_those_of_the_definition():
    """What flex_attention and FlashAttention share, with the log-sum-exp of our own summary."""
    problem = Problem(Case(correctness.SMALL[0], 300, 3, torch.float32), "cpu")
    lse = ops.attention_summary(problem.query, problem.key, problem.value, problem.spans, problem.visibility).lse
    found = providers.terms(problem, *providers.sums_from_lse(problem, problem.output, lse))
    for term, exact in zip(found, correctness.naive_terms(problem, torch.float64), strict=True):
        torch.testing.assert_close(term.double(), exact, atol=1e-5, rtol=0)  # float32 sums of order 1


def test_results_and_notes_are_no_change_of_the_code(tmp_path, monkeypatch):
    """Or the second of two runs would count as another commit, and a report would lose the first."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    files = {"code.py": "1", "benchmarks/NOTES.md": "1", "benchmarks/results/kernels.csv": "1"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "all")):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    clean = machine.commit()
    assert len(clean) >= 7 and "+" not in clean
    (tmp_path / "benchmarks" / "NOTES.md").write_text("2")
    (tmp_path / "benchmarks" / "results" / "kernels.csv").write_text("2")
    assert machine.commit() == clean
    (tmp_path / "code.py").write_text("2")
    assert machine.commit() == f"{clean}+"
