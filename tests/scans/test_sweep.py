"""A sweep on the planted model says what is true of it: the heads that write the answer carry it, the others do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from locos_fast import planted
from locos_fast.causal.ablation import MODES, ablate
from locos_fast.causal.answers import given_answers
from locos_fast.causal.head_sets import Ranking
from locos_fast.causal.model_shape import model_shape
from locos_fast.planted.trials import planted_trials
from locos_fast.scans import sweep as sweeps
from locos_fast.scans.run import scan
from locos_fast.scans.sweep import LINES, RESULT, Point, plan, sweep
from tests.oracles.planted_trials import make_trials
from tests.oracles.threads import one_thread


@pytest.fixture(scope="module")
def model() -> planted.PlantedModel:
    return planted.build()


@pytest.fixture(scope="module", params=["literal", "non_literal"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def scores(model, kind, tmp_path_factory: pytest.TempPathFactory):
    trials = planted_trials(model.tokenizer, kind, lengths=[60], depths=3, limit=6)
    with one_thread():
        return scan(model.model, model.tokenizer, trials, tmp_path_factory.mktemp("scan")).scores


def test_the_heads_that_locos_finds_carry_recall_and_no_others_do(model, kind, scores, tmp_path: Path) -> None:
    count = len(model.heads[kind])
    rankings = {name: Ranking.of(scores, name) for name in ("score", "locos_foil", "dla_foil")}
    points = plan(rankings, model_shape(model.model), [count], count=5)
    trials = planted_trials(model.tokenizer, kind, lengths=[60, 90], depths=2, limit=8, seed=5)
    found = sweep(model.model, trials, points, tmp_path)
    assert (found.trials, found.passed) == (8, 8)
    for name in rankings:
        assert found.values(name, count) == [0.0]
    assert found.values("bottom", count) == [1.0]
    assert min(found.values("layer-matched", count)) >= 0.95
    against = found.against("score", count, "layer-matched")
    assert (against.percentile, against.p_value) == (0.0, pytest.approx(1 / 6))
    assert found.values("score", count, "log_probability")[0] < found.baseline - 1


def test_wu_leaves_questions_whose_answer_is_not_in_the_needle(model, tmp_path: Path) -> None:
    """His best heads on literal questions are other heads."""
    literal = planted_trials(model.tokenizer, "literal", lengths=[60], depths=3, limit=6)
    wu = Ranking.of(scan(model.model, model.tokenizer, literal, tmp_path / "scan").scores, "wu")
    count = len(model.heads["literal"])
    points = [Point("wu", count, 0, wu.top(count))]
    other = planted_trials(model.tokenizer, "non_literal", lengths=[60], depths=2, limit=4)
    assert sweep(model.model, other, points, tmp_path / "sweep").accuracy == [1.0]


def test_answers_are_those_of_one_prompt_after_the_other(model) -> None:
    trials, heads = make_trials(70, "literal", 5), model.heads["literal"][:1]
    found = given_answers(model.model, trials, heads)
    for trial, answer in zip(trials, found, strict=True):
        with torch.inference_mode(), ablate(model.model, heads):
            logits = model.model(trial.input_ids[:, :-1]).logits[0, -len(trial.answer_ids) :].double()
        expected = logits.log_softmax(-1)[range(len(trial.answer_ids)), trial.answer_ids].sum()
        assert answer.log_probability == pytest.approx(float(expected), abs=1e-4)
        assert answer.right == (logits.argmax(-1).tolist() == trial.answer_ids)


def points_of(model) -> list[Point]:
    return [Point("given", k, 0, model.heads["literal"][:k]) for k in (1, 2)] + [Point("random", 1, 0, [(7, 3)])]


def test_an_interrupted_sweep_resumes_to_the_byte(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials, points = make_trials(60, "literal", 3), points_of(model)
    whole = sweep(model.model, trials, points, tmp_path / "whole")
    real, calls = sweeps.given_answers, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweeps, "given_answers", interrupted)
        sweep(model.model, trials, points, tmp_path / "x")
    with (tmp_path / "x" / LINES).open("a") as lines:
        lines.write('{"key": "half')
    seen = []
    resumed = sweep(model.model, trials, points, tmp_path / "x", resume=True, progress=seen.append)
    assert [progress.done for progress in seen] == [2, 3] and resumed == whole
    for name in (RESULT, LINES):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_same_heads_are_ablated_once(model, tmp_path: Path) -> None:
    heads, seen = model.heads["literal"][:2], []
    points = [Point("score", 2, 0, heads), Point("wu", 2, 0, heads[::-1])]
    found = sweep(model.model, make_trials(60, "literal", 2), points, tmp_path, progress=seen.append)
    assert [(progress.done, progress.total) for progress in seen] == [(1, 1)]
    assert found.accuracy[0] == found.accuracy[1]


def test_a_sweep_resumes_its_own_configuration_trials_and_heads_only(model, tmp_path: Path) -> None:
    trials, points = make_trials(60, "literal", 2), points_of(model)
    sweep(model.model, trials, points, tmp_path)
    with pytest.raises(FileExistsError, match="already holds a sweep; --resume"):
        sweep(model.model, trials, points, tmp_path)
    others = make_trials(50, "literal", 4)[2:]
    with pytest.raises(ValueError, match='mode was "output-zero", is "output-mean"'):
        sweep(model.model, trials, points, tmp_path, mode="output-mean", calibration=others, resume=True)
    with pytest.raises(ValueError, match="other trials or other sets of heads"):
        sweep(model.model, trials[:1], points, tmp_path, resume=True)
    with pytest.raises(ValueError, match="other trials or other sets of heads"):
        sweep(model.model, trials, points[:2], tmp_path, resume=True)


def test_other_weights_are_another_sweep_and_another_device_or_path_is_not(model, tmp_path: Path) -> None:
    trials, points, other = make_trials(60, "literal", 2), points_of(model), planted.build(seed=1)
    before = sweep(model.model, trials, points, tmp_path, config={"heads": "here", "device": "cuda:1"})
    assert sweep(model.model, trials, points, tmp_path, config={"heads": "there"}, resume=True) == before
    with pytest.raises(ValueError, match="weights was "):
        sweep(other.model, trials, points, tmp_path, resume=True)


def test_a_folder_of_something_else_is_left_alone(model, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds something else"):
        sweep(model.model, make_trials(60, "literal", 1), points_of(model), tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "sweep.json").write_text('{"schema_version": 1}')
    with pytest.raises(ValueError, match=r"sweep\.json: no plan of a sweep that can be read"):
        sweep(model.model, make_trials(60, "literal", 1), points_of(model), tmp_path, resume=True)


def test_a_model_that_answers_nothing_cannot_lose_anything(model, tmp_path: Path) -> None:
    trials = make_trials(60, "literal", 2)
    for trial in trials:
        object.__setattr__(trial, "answer_ids", [trial.answer_ids[0] + 1])
    with pytest.raises(ValueError, match="no trial counts: the intact model answers none of 2 right"):
        sweep(model.model, trials, points_of(model), tmp_path)


def test_the_result_is_json(model, tmp_path: Path) -> None:
    found = sweep(model.model, make_trials(60, "literal", 2), points_of(model), tmp_path)
    kept = json.loads((tmp_path / RESULT).read_text())
    assert kept["baseline"]["passed"] == 2
    assert {(p["set"], p["k"], p["draw"], p["metric"]) for p in kept["points"]} == {
        (point.set, point.k, point.draw, metric)
        for point in points_of(model)
        for metric in ("accuracy", "log_probability")
    }
    assert np.isfinite([p["value"] for p in kept["points"]]).all() and kept["config"]["mode"] == "output-zero"
    assert found.ks == [1, 2]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_takes_recall_away(model, mode: str, tmp_path: Path) -> None:
    """Also the published ones, in which the head goes on writing the mean of all values."""
    trials, others = make_trials(60, "literal", 3), make_trials(50, "literal", 5)[3:]
    points = [Point("given", 3, 0, model.heads["literal"])]
    found = sweep(model.model, trials, points, tmp_path, mode=mode, calibration=others)
    assert found.log_probability[0] < found.baseline - 1
    assert found.accuracy[0] <= 1 / 3


def test_a_mode_that_needs_other_prompts_says_so(model, tmp_path: Path) -> None:
    trials = make_trials(60, "literal", 2)
    with pytest.raises(ValueError, match="calibration: expected trials for mode 'output-mean', got none"):
        sweep(model.model, trials, points_of(model), tmp_path, mode="output-mean")
    with pytest.raises(ValueError, match="mode: expected one of output-zero"):
        sweep(model.model, trials, points_of(model), tmp_path, mode="what")
