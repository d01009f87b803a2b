"""A scan of the planted model finds what was planted, and Wu's copy score only the literal part of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from locos_fast import planted
from locos_fast.planted.model import KINDS
from locos_fast.planted.trials import planted_trials
from locos_fast.planted.vocabulary import CITIES, NAMES, TOKENS
from locos_fast.prompts.scan_trials import scan_trials
from locos_fast.scans.run import scan
from tests.oracles.threads import one_thread

GRID = {"lengths": [60, 120], "depths": 3}


@pytest.fixture(scope="module")
def model():
    return planted.build()


def scores_of(model, folder: Path, kind: str | None):
    trials, config, _ = planted_trials(model.tokenizer, kind, **GRID, limit=12)
    with one_thread():
        return scan(model.model, model.tokenizer, trials, folder, config=config).scores


def test_a_scan_of_both_kinds_finds_all_retrieval_heads_and_wu_the_literal_ones_alone(model, tmp_path: Path) -> None:
    scores = scores_of(model, tmp_path / "both", None)
    assert set(scores.found()) == {*model.heads["literal"], *model.heads["non_literal"]}
    copied = set(scores.found(by="wu"))
    assert set(model.heads["literal"]) <= copied
    assert not copied & set(model.heads["non_literal"])
    assert all(scores.wu[head] == 0 for head in model.heads["non_literal"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_of_one_kind_finds_its_heads(model, tmp_path: Path, kind: str) -> None:
    scores = scores_of(model, tmp_path / kind, kind)
    assert set(scores.found()) == set(model.heads[kind])
    if kind == "non_literal":
        assert (scores.wu == 0).all()
    assert set(model.heads["write_only"]) <= set(scores.found(by="dla"))  # they write every answer alike
    assert set(scores.found(by="dla_foil")) == set(model.heads[kind])
    assert set(scores.found(by="locos_foil")) == set(model.heads[kind])


def test_every_cell_asks_every_question_in_both_kinds(model) -> None:
    trials, config, _ = planted_trials(model.tokenizer, **GRID, limit=25)
    assert len(trials) == 24 and config["kinds"] == list(KINDS)
    kind_of = Counter((t.length, t.depth, "literal" if t.answer in NAMES else "non_literal") for t in trials)
    assert len(kind_of) == 12 and set(kind_of.values()) == {2}
    assert len({tuple(t.prompt_ids) for t in trials}) == 24


def test_trials_are_drawn_with_the_seed(model) -> None:
    one, same, other = (planted_trials(model.tokenizer, **GRID, limit=12, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert not {tuple(t.prompt_ids) for t in one.trials} & {tuple(t.prompt_ids) for t in other.trials}


def test_questions_and_foils_are_known_in_tokens(model) -> None:
    for trial in planted_trials(model.tokenizer, **GRID, limit=96).trials:
        assert " ".join(TOKENS[i] for i in trial.prompt_ids[slice(*trial.question_span)]) == trial.question
        assert [TOKENS[i] for i in trial.foil_ids] == [trial.foil] != [trial.answer]
        assert any({trial.foil, trial.answer} <= set(kind) for kind in (NAMES, CITIES))
        assert trial.foil_ids[0] not in trial.prompt_ids


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("figurative", {}, "dataset: planted has the kinds literal and non_literal, got 'figurative'"),
        (None, {"limit": 1}, "limit: expected at least 2, a trial of each kind, got 1"),
        (None, {"lengths": [5]}, "length: expected 8 to"),
        (None, {"depths": "x"}, "depths: expected"),
    ],
)
def test_what_is_no_scan_of_it_is_refused(model, kind, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        planted_trials(model.tokenizer, kind, **(GRID | options))


def test_another_models_tokenizer_is_refused(model) -> None:
    other = planted.build(layers=4).tokenizer
    other.add_tokens(["novel"])
    with pytest.raises(ValueError, match="dataset: planted is asked of the planted model alone"):
        planted_trials(other, **GRID)
    with pytest.raises(ValueError, match="planted_trials"):
        scan_trials(other, "planted", lengths=[60])
