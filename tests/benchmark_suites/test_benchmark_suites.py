"""What all suites of the benchmarks share, and the suites of whole models. Nothing is timed for its time here."""

import csv
import io
import json
import sys
from argparse import Namespace

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as benchmarks_main
from benchmarks import (
    kernels_suite,
    machine,
    measurements,
    model_cases,
    model_checks,
    model_goals,
    model_suite,
    models,
    notes,
    plots,
    results_file,
    rounds,
    terminal,
    trial_cases,
    trial_suite,
)
from benchmarks.geometries import LONG, QWEN3_8B, Case
from benchmarks.measurements import BANDWIDTH, MEMORY, OVERHEAD, RATIO, TIME, Absent, Measurement, Results
from benchmarks.model_cases import ModelCase
from benchmarks.model_providers import AGAIN, ATTRIBUTE, CHUNKED, FORWARD, PROVIDERS, SCORE
from benchmarks.number_tokenizer import NumberTokenizer
from benchmarks.public_pipeline import PublicPipeline, PublicScores, Unavailable, commit_of
from benchmarks.results_file import Origin
from benchmarks.suite import Panel, Refused, line
from benchmarks.trial_cases import TrialCase
from locos_fast import planted, score_tokens

CASE = Case(QWEN3_8B, LONG, 8, torch.float32)
TINY = models.Shape("tiny", 2, 64, 96, 4, 2, 16, 300, torch.float32)
ON_GPU = ModelCase(models.QWEN3_8B, 102_400, 8192)
GPU = Origin("NVIDIA H200", "python 3.11, torch 2.13+cu130, cuda 13.0", "abc", "2026-01-01T00:00:00+00:00")
CPU = Origin("a CPU, 2 threads", "python 3.11, torch 2.13+cpu", "abc", "2026-01-01T00:00:00+00:00")

# made before any test replaces torch.empty: PyTorch asks once what its device contexts apply to
EIGHT_BILLION = models.build(models.QWEN3_8B, "meta")

ABSENT = Absent("flex_attention", CASE, "flex_attention gives no log-sum-exp on a CPU")


def printed(cells, lines):
    console = Console(file=io.StringIO(), width=250)
    console.print(terminal.table(cells), *lines)
    return console.file.getvalue()


class TestResultsFile:
    def test_rows_have_all_columns(self, tmp_path):
        rows = [
            Measurement.of("pipeline", TIME, [3.0, 1.0, 2.0], CASE),
            Measurement.of("pipeline", MEMORY, [4096], CASE),
            Measurement.of("memory.copy", BANDWIDTH, [1e10]),
        ]
        origin = Origin.here("cpu")
        results_file.append(tmp_path, "kernels", Results(rows, []), origin)
        file = results_file.append(tmp_path, "kernels", Results(rows, []), origin)
        with file.open(newline="") as stream:
            table = list(csv.DictReader(stream))
        assert len(table) == 2 * len(rows), "a second run is appended, with no second header"
        for row in table:
            assert list(row) == results_file.COLUMNS
            assert all(row.values())
            assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
            assert json.loads(row["config"]) == (CASE.config if row["metric"] in (TIME, MEMORY) else {})

    def test_absent_providers_have_a_row_with_the_reason(self, tmp_path):
        file = results_file.append(tmp_path, "kernels", Results([], [ABSENT]), CPU)
        with file.open(newline="") as stream:
            (row,) = csv.DictReader(stream)
        assert (row["provider"], row["metric"], row["p50"]) == ("flex_attention", "absent", "")
        assert json.loads(row["config"]) == CASE.config | {"reason": ABSENT.reason}

    @pytest.mark.parametrize(
        ("suite", "case"),
        [
            (kernels_suite.SUITE, CASE),
            (model_suite.SUITE, ON_GPU),
            (trial_suite.SUITE, TrialCase("planted", 8, 16, 512, 1, "float32", "abc")),
        ],
        ids=lambda x: getattr(x, "name", None),
    )
    def test_what_was_written_is_read(self, tmp_path, suite, case):
        results = Results([Measurement.of("a", TIME, [1.0, 2.0], case)], [Absent("b", case, "no reason")])
        results_file.append(tmp_path, suite.name, results, GPU)
        assert results_file.latest(tmp_path, suite.name, "cuda", suite.case_of) == (results, GPU)
        assert results_file.latest(tmp_path, suite.name, "cpu", suite.case_of) is None

    def test_calls_on_one_machine_and_commit_are_put_together(self, tmp_path):
        other = CASE._replace(n_keys=4096)
        absent_first = Absent("b", other, "out of memory")
        for origin, measured, absent in (
            (GPU._replace(commit="old", date="2025"), [Measurement.of("a", TIME, [9.0], CASE)], []),
            (GPU, [Measurement.of("a", TIME, [1.0], CASE)], [absent_first]),
            (GPU, [Measurement.of("a", TIME, [2.0], CASE), Measurement.of("b", TIME, [3.0], other)], []),
            (CPU, [Measurement.of("a", TIME, [4.0], CASE)], []),
        ):
            results_file.append(tmp_path, "kernels", Results(measured, absent), origin)
        results, origin = results_file.latest(tmp_path, "kernels", "cuda", Case.from_config)
        assert origin == GPU
        assert results.median("a", CASE, TIME) == 2.0, "the last time counts"
        assert results.median("b", other, TIME) == 3.0
        assert results.absent == [], "what was measured later is not absent"


class TestShowing:
    def test_absent_providers_are_listed(self):
        results = Results([Measurement.of("pipeline", TIME, [1.0], CASE)], [ABSENT])
        suite = kernels_suite.SUITE
        text = printed(suite.cells(results, "cpu"), suite.remarks(results, "cpu"))
        assert "flex_attention" in text
        assert "no log-sum-exp" in text

    def test_what_ran_nowhere_is_listed(self):
        case = TrialCase("planted", 8, 16, 512, 1, "float32", "")
        results = Results([], [Absent("public", case, "not given: git clone")])
        text = printed(trial_suite.cells(results, "cpu"), trial_suite.remarks(results, "cpu"))
        assert "absent" in text
        assert "not given: git clone" in text

    @pytest.mark.parametrize(("suite", "marks"), [("kernels", "cpu"), ("model", "cpu model")])
    def test_notes_get_the_table_between_the_marks(self, tmp_path, suite, marks):
        file = tmp_path / "NOTES.md"
        file.write_text(f"before\n<!-- {marks} -->\nold\n<!-- /{marks} -->\nafter\n")
        results = Results([Measurement.of("pipeline", TIME, [1.0], CASE)], [ABSENT])
        cells = kernels_suite.SUITE.cells(results, "cpu")
        for _ in range(2):
            notes.write(suite, "cpu", str(CPU), cells, ["PASS  a goal", *results.reasons], file)
        text = file.read_text()
        assert text.startswith(f"before\n<!-- {marks} -->\n{CPU}\n")
        assert text.endswith(f"<!-- /{marks} -->\nafter\n")
        assert "old" not in text
        assert text.count("| pipeline |") == 1
        assert ABSENT.reason in text
        with pytest.raises(ValueError, match="<!-- cuda"):
            notes.write(suite, "cuda", str(GPU), cells, [], file)

    @pytest.mark.parametrize("suite", list(benchmarks_main.SUITES))
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_notes_have_the_marks_of_every_suite(self, tmp_path, suite, device):
        copy = tmp_path / "NOTES.md"
        copy.write_text(notes.NOTES.read_text())
        notes.write(suite, device, "heading", kernels_suite.SUITE.cells(Results([], []), device), [], copy)

    @pytest.mark.parametrize("unit", ["s", "B", "%"])
    def test_plot_is_drawn(self, tmp_path, unit):
        results = Results([Measurement.of("a", TIME, [0.01, 0.02], CASE)], [])
        panel = Panel("title", "x", "y", unit, [measured_line(results, "a"), measured_line(results, "nowhere")])
        file = plots.draw([panel], "heading", tmp_path / "folder" / "a.png")
        assert file.read_bytes().startswith(b"\x89PNG")


def measured_line(results, provider):
    return line(results, provider, provider, TIME, [(CASE.n_keys, CASE)])


class TestRounds:
    def test_providers_take_turns(self):
        calls = []
        found = rounds.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", budget=1e-9)
        assert calls[:8] == ["a", "b"] * 4, "one warm-up, then rounds"
        assert {name: len(seconds) for name, seconds in found.time.items()} == {"a": 3, "b": 3}

    def test_out_of_memory_is_said_and_the_others_run(self):
        def fails():
            raise torch.OutOfMemoryError("CUDA out of memory")

        found = rounds.measure({"a": fails, "b": lambda: None}, "cpu", budget=1e-9)
        assert found.failed == {"a": "out of memory"}
        assert list(found.time) == ["b"]

    def test_other_errors_are_raised(self):
        def fails():
            raise RuntimeError("a bug")

        with pytest.raises(RuntimeError, match="a bug"):
            rounds.measure({"a": fails}, "cpu", budget=1e-9)

    def test_overhead_is_paired_by_round(self):
        found = rounds.Rounds({FORWARD: [1.0, 2.0, 4.0], SCORE: [1.1, 2.2, 4.4]}, {}, {}, {})
        (overhead,) = model_suite.overheads(found, ON_GPU)
        assert (overhead.provider, overhead.metric) == (SCORE, OVERHEAD)
        assert overhead.p20 == pytest.approx(0.1)
        assert overhead.p80 == pytest.approx(0.1)


class TestModelSuite:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("quick", [True, False])
    def test_segments_cover_the_prompt_and_the_needle_lies_in_it(self, device, quick):
        for case in model_cases.plan(device, quick=quick):
            assert case.shape == models.OF_DEVICE[device]
            assert len(case.segments) == min(1000, case.n_tokens - 8)
            ends = [0, *(end for _, end in case.segments)]
            assert ends[:-1] == [start for start, _ in case.segments]
            assert ends[-1] == case.answer_positions[0] == case.n_tokens - 8
            lengths = {end - start for start, end in case.segments}
            assert max(lengths) - min(lengths) <= 1
            assert 0 < case.needle[0] < case.needle[1] == case.needle[0] + 32 < case.answer_positions[0]

    def test_geometry_is_that_of_qwen3_8b(self):
        parameters = sum(parameter.numel() for parameter in EIGHT_BILLION.parameters())
        assert parameters == 8_190_735_360, "what the published model has"
        assert EIGHT_BILLION.dtype == torch.bfloat16
        assert EIGHT_BILLION.config.max_position_embeddings == 131_072

    def test_model_is_random_reproducible_and_leaves_the_random_state(self):
        state = torch.get_rng_state()
        first, second = (models.build(TINY, "cpu").model.layers[1].mlp.up_proj.weight for _ in range(2))
        assert torch.equal(first, second)
        assert first.std().item() == pytest.approx(0.02, rel=0.05)
        assert torch.equal(torch.get_rng_state(), state)

    def test_checks_pass_on_a_small_model(self):
        agreements = list(model_checks.check(TINY._replace(dtype=torch.bfloat16), "cpu"))
        assert len(agreements) == 8, "three pairs of float32 and their chunks, three pairs of bfloat16"
        assert all(agreement.passed for agreement in agreements), agreements

    def test_a_wrong_score_refuses_to_time(self, monkeypatch):
        def wrong(*args, backend="auto", **options):
            scores = score_tokens(*args, backend=backend, **options)
            scores.score[:] *= 1.01 if backend == "reference" else 1.0
            return scores

        monkeypatch.setattr(model_checks, "score_tokens", wrong)
        monkeypatch.setattr(model_suite, "OF_DEVICE", {"cpu": TINY})
        monkeypatch.setattr(model_suite, "build", None)  # would raise
        with pytest.raises(Refused, match="same by every path"):
            next(model_suite.measure(Namespace(device="cpu", quick=True, context=None)))

    def test_distance_sees_nan(self):
        one, nan = torch.ones(2).numpy(), torch.tensor([1.0, torch.nan]).numpy()
        assert not model_checks.Agreement("a", model_checks.distance(one, nan), 1.0).passed
        assert model_checks.distance(nan, nan) == 0

    def test_runs_end_to_end(self, monkeypatch, tmp_path, capsys):
        cases = [ModelCase(TINY, 128, 50)]
        monkeypatch.setattr(model_suite, "OF_DEVICE", {"cpu": TINY})
        monkeypatch.setattr(model_suite, "plan", lambda *_, **__: cases)
        monkeypatch.setattr(model_suite, "BUDGET", {("cpu", True): 1e-9})
        assert benchmarks_main.main(["--device=cpu", "--quick", "--only", "model", "--out", str(tmp_path)]) == 0
        results, _ = results_file.latest(tmp_path, "model", "cpu", ModelCase.from_config)
        for case in cases:
            for provider in PROVIDERS:
                assert results.median(provider.name, case, TIME) > 0
                assert results.median(provider.name, case, MEMORY) > 0
                assert (results.median(provider.name, case, OVERHEAD) is None) == (provider.name == FORWARD)
        assert (tmp_path / "model-cpu.png").is_file()
        assert "PASS" not in capsys.readouterr().out, "nothing is judged on a CPU"
        assert benchmarks_main.main(["--device=cpu", "--report", "--only", "model", "--out", str(tmp_path)]) == 0


class TestModelGoals:
    def judge(self, measured, device="cuda"):
        return [goal.passed for goal in model_goals.judge(Results(measured, []), device)]

    @pytest.mark.parametrize(
        ("n_tokens", "provider", "limit"),
        [(8192, SCORE, 0.01), (8192, ATTRIBUTE, 0.03), (102_400, SCORE, 0.001), (102_400, ATTRIBUTE, 0.005)],
    )
    def test_overhead(self, n_tokens, provider, limit):
        case = ON_GPU._replace(n_tokens=n_tokens)
        noise = Measurement.of(AGAIN, OVERHEAD, [0.0004], case)
        assert self.judge([Measurement.of(provider, OVERHEAD, [0.99 * limit], case), noise]) == [True]
        assert self.judge([Measurement.of(provider, OVERHEAD, [1.01 * limit], case), noise]) == [False]
        assert self.judge([Measurement.of(provider, OVERHEAD, [9.0], case)], "cpu") == [None]
        (goal,) = model_goals.judge(Results([Measurement.of(provider, OVERHEAD, [0.02], case), noise], []), "cuda")
        assert "+2.000%" in goal.text
        assert "against itself +0.040%" in goal.text

    def test_other_lengths_are_not_judged(self):
        assert self.judge([Measurement.of(SCORE, OVERHEAD, [9.0], ON_GPU._replace(n_tokens=4096))]) == [None]

    @pytest.mark.parametrize(("gibibytes", "passed"), [(5.9, True), (6.1, False)])
    def test_peak(self, gibibytes, passed):
        assert self.judge([Measurement.of(CHUNKED, MEMORY, [gibibytes * 2**30], ON_GPU)]) == [passed]

    @pytest.mark.parametrize(("seconds", "passed"), [(1.04, True), (1.06, False)])
    def test_chunking(self, seconds, passed):
        measured = [Measurement.of(SCORE, TIME, [1.0], ON_GPU), Measurement.of(CHUNKED, TIME, [seconds], ON_GPU)]
        assert self.judge(measured) == [passed]

    def test_prompt_that_fits_a_chunk_says_nothing_of_chunking(self):
        case = ON_GPU._replace(n_tokens=8192)
        assert self.judge([Measurement.of(SCORE, TIME, [1.0], case), Measurement.of(CHUNKED, TIME, [2.0], case)]) == []


class FromScoreTokens:
    """Stands for the public code: the same scores by our own hand, for an answer it claims to have generated."""

    def __init__(self, factor=1.0, generated="17 5 17"):
        self.commit, self.factor, self.generated = "f00", factor, generated
        self.stop = set()

    def scorer(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        return self

    def score(self, prompt_ids, needle, answer, *, steps):
        if not answer:
            return PublicScores(*[None] * 3, 0, self.generated)
        answer_ids = self.tokenizer.encode(answer, add_special_tokens=False)
        ids = torch.cat([prompt_ids, torch.tensor([answer_ids])], dim=1)
        found = score_tokens(self.model, ids, needle, range(prompt_ids.shape[1], ids.shape[1]))
        steps = 0 if self.factor is None else len(answer_ids)
        factor = self.factor or 1.0
        return PublicScores(factor * found.score, found.l_plus, found.l_minus, steps, answer)


class TestTrialSuite:
    @pytest.fixture
    def small(self, monkeypatch):
        monkeypatch.setattr(trial_suite, "OF_DEVICE", {"cpu": TINY})
        monkeypatch.setattr(trial_suite, "VOCABULARY", 300)
        monkeypatch.setattr(trial_suite, "CHECKED_TOKENS", 100)
        monkeypatch.setattr(trial_suite, "BUDGET", {("cpu", True): 1e-9})
        monkeypatch.setattr(trial_cases, "OF_DEVICE", {"cpu": TINY})
        monkeypatch.setattr(trial_cases, "CONTEXTS", {("cpu", True): (100,)})
        small_model = planted.build(layers=4, heads=4, kv_heads=2, head_dim=64)
        monkeypatch.setattr(planted, "build", lambda: small_model)

    def results(self, public, monkeypatch):
        monkeypatch.setattr(trial_suite, "PublicPipeline", lambda folder: public)
        parts = list(trial_suite.measure(Namespace(device="cpu", quick=True, context=None, public=None)))
        return Results([m for part in parts for m in part.measurements], [a for part in parts for a in part.absent])

    @pytest.mark.usefixtures("small")
    def test_both_are_timed_on_both_models(self, monkeypatch):
        results = self.results(FromScoreTokens(), monkeypatch)
        assert [(case.model, case.steps, case.public) for case in results.cases] == [
            ("planted", 1, "f00"),
            ("tiny", 3, "f00"),
        ]
        for case in results.cases:
            assert results.median("public", case, TIME) > 0
            assert results.median("score_tokens", case, RATIO) > 0
        assert not results.absent

    @pytest.mark.usefixtures("small")
    def test_other_scores_refuse_to_time(self, monkeypatch):
        with pytest.raises(Refused, match="not those of the public code"):
            self.results(FromScoreTokens(factor=1.001), monkeypatch)

    @pytest.mark.usefixtures("small")
    def test_another_answer_refuses_to_time(self, monkeypatch):
        with pytest.raises(Refused, match="not those of the public code"):
            self.results(FromScoreTokens(factor=None), monkeypatch)

    @pytest.mark.usefixtures("small")
    def test_without_the_public_code_it_is_absent_and_ours_is_timed(self, tmp_path, capsys, monkeypatch):
        monkeypatch.delenv("LOCOS_PUBLIC", raising=False)
        assert benchmarks_main.main(["--device=cpu", "--quick", "--only", "trial", "--out", str(tmp_path)]) == 0
        results, _ = results_file.latest(tmp_path, "trial", "cpu", TrialCase.from_config)
        assert {absent.provider for absent in results.absent} == {"public"}
        assert all("git clone https://github.com/aryopg/locos" in absent.reason for absent in results.absent)
        assert all(results.median("score_tokens", case, TIME) > 0 for case in results.cases)
        assert "--public DIR" in capsys.readouterr().out.replace("\n", " ")


class TestPublicPipeline:
    def test_a_folder_without_it_is_refused(self, tmp_path):
        with pytest.raises(Unavailable, match="is no clone"):
            PublicPipeline(tmp_path)

    def test_a_folder_inside_another_repository_has_no_commit(self, tmp_path):
        assert commit_of(machine.ROOT / "benchmarks") == "unknown"
        assert commit_of(tmp_path) == "unknown"

    def test_failing_import_is_the_reason(self, tmp_path):
        package = tmp_path / "locos" / "detectors"
        package.mkdir(parents=True)
        (package / "logit_contrib.py").write_text("import no_such_package_at_all\n")
        before = set(sys.modules)
        with pytest.raises(Unavailable, match="no_such_package_at_all"):
            PublicPipeline(tmp_path)
        assert set(sys.modules) == before, "another folder may be tried"

    def test_numbers_are_their_own_tokens(self):
        tokenizer = NumberTokenizer()
        assert tokenizer.encode(tokenizer.decode([17, 5, 17])) == [17, 5, 17]


def test_every_metric_has_a_unit():
    assert set(measurements.UNITS) >= {TIME, MEMORY, BANDWIDTH, OVERHEAD, RATIO}
