"""`locos-fast scan` over the data sets of others and over the planted model's own trials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from locos_fast import HeadScores, planted
from tests.oracles.entry_point import run
from tests.oracles.planted_scan import MODEL, scan_command, write_planted_scan
from tests.oracles.published_data import write_niah, write_nolima


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted model, a planted scan's files, and nolima/ and niah/ in the planted model's words."""
    path = tmp_path_factory.mktemp("planted")
    write_planted_scan(path)
    entry = {
        "id": "1",
        "task_template": "{haystack}\n{question}",
        "needle": "{1} hosts {CHAR} .",
        "questions": {"onehop": "who {1} ANSWER"},
        "character_set": ["Ada", "Leo", "Olga"],
        "tests": {f"T{i}": {"input_args": [place]} for i, place in enumerate(("Louvre", "Prado", "Wawel", "Tivoli"))},
    }
    write_nolima(path / "nolima", [entry])
    for book in (path / "nolima/haystack/rand_shuffle").glob("*.txt"):
        book.write_text((path / "haystack.txt").read_text())
    needle = {"needle": "Louvre hosts Leo .", "question": "who Louvre ANSWER", "real_needle": "Leo"}
    write_niah(path / "niah", [needle])
    return path


def test_the_planted_model_is_scanned_without_any_file(capsys, monkeypatch, folder, tmp_path) -> None:
    command = scan_command(folder, tmp_path / "x", dataset="planted", haystack=None)
    code, out, err = run(capsys, monkeypatch, [*command, "--json"])
    assert code == 0, err
    assert (json.loads(out)["trials"], json.loads(out)["gate_rate"]) == (24, 1)
    scores, heads = HeadScores.from_pretrained(tmp_path / "x"), planted.build(**MODEL).heads
    assert set(scores.found()) == {*heads["literal"], *heads["non_literal"]}
    assert (scores.meta["dataset"], scores.meta["kinds"]) == ("planted", ["literal", "non_literal"])


def test_one_kind_of_planted_trials_is_chosen_behind_a_colon(capsys, monkeypatch, folder, tmp_path) -> None:
    command = scan_command(folder, tmp_path / "x", dataset="planted:non_literal", haystack=None, limit="12")
    code, _, err = run(capsys, monkeypatch, command)
    assert code == 0, err
    assert HeadScores.from_pretrained(tmp_path / "x").found() == planted.build(**MODEL).heads["non_literal"]


def test_nolima_finds_the_planted_literal_heads(capsys, monkeypatch, folder, tmp_path) -> None:
    command = scan_command(
        folder, tmp_path / "x", dataset=f"nolima:{folder / 'nolima'}", haystack=None, characters="2", limit="48"
    )
    code, out, err = run(capsys, monkeypatch, [*command, "--json"])
    assert code == 0, err
    assert (json.loads(out)["trials"], json.loads(out)["gate_rate"]) == (48, 1)
    scores = HeadScores.from_pretrained(tmp_path / "x")
    assert scores.found() == planted.build(**MODEL).heads["literal"]
    meta = scores.meta
    assert (meta["dataset"], meta["question_type"], meta["characters"]) == ("nolima", "onehop", 2)


def test_another_question_type_is_another_scan(capsys, monkeypatch, folder, tmp_path) -> None:
    command = scan_command(folder, tmp_path / "x", dataset=f"nolima:{folder / 'nolima'}", haystack=None, limit="6")
    assert run(capsys, monkeypatch, command)[0] == 0
    code, _, err = run(capsys, monkeypatch, [*command, "--resume", "--characters=3"])
    assert code == 2 and "characters was 1, is 3" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nolima:{}/nolima", "question_type": "x"}, "question-type: expected onehop or twohop or twohop2"),
        ({"dataset": "nolima:{}/nolima", "question_type": "twohop"}, "question-type: no entry of"),
        ({"dataset": "nolima:{}/nolima", "haystack": "essays"}, "haystack: nolima brings its own, got 'essays'"),
        ({"dataset": "nolima:{}/none"}, "dataset: nolima: {}/none has no needlesets/needle_set.json; `locos-fast data"),
        ({"dataset": "niah:{}/none"}, "dataset: niah: {}/none has no needles.jsonl; by hand: from https://github.com"),
        ({"dataset": "niah:{}/niah", "lengths": "12"}, "length: 12 tokens are too few: needle and question of"),
        ({"dataset": "nolima:{}/nolima", "lengths": "9000"}, "tokens are too few for prompts of 9000"),
        ({"dataset": "numbers", "question_type": "onehop"}, "question-type: only nolima and nolima-hard have them"),
        ({"dataset": "planted:odd"}, "dataset: planted has the kinds literal and non_literal, got 'odd'"),
        ({"dataset": "planted", "haystack": "essays"}, "haystack: planted has none"),
        ({"dataset": "planted", "needles_per_context": "2", "depths": None}, "needles-per-context: planted has none"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, folder, tmp_path, changes: dict, message: str) -> None:
    given = {"haystack": None} | {k: v and v.replace("{}", str(folder)) for k, v in changes.items()}
    code, out, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x", **given))
    assert (code, out) == (2, "") and message.replace("{}", str(folder)) in err and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists()


def test_a_chat_template_that_is_not_there_is_refused(capsys, monkeypatch, folder, tmp_path) -> None:
    command = scan_command(folder, tmp_path / "x", dataset=f"niah:{folder / 'niah'}", haystack=None)
    code, _, err = run(capsys, monkeypatch, [*command, "--chat-template"])
    assert code == 2 and "chat template: this tokenizer has none; --no-chat-template" in err and err.count("\n") == 1
