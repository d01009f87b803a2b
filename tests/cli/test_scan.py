"""`locos-fast scan` and `merge`: right results, and one clear line for everything that can be wrong with the input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from locos_fast import HeadScores, planted
from locos_fast.scans import attempt
from tests.oracles.entry_point import run
from tests.oracles.planted_scan import MODEL, scan_command, write_planted_scan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted")
    write_planted_scan(path)
    return path


@pytest.mark.parametrize(("dataset", "role"), [("literal", "literal"), ("bridges", "non_literal")])
def test_a_scan_finds_the_planted_heads(capsys, monkeypatch, folder, tmp_path, dataset: str, role: str) -> None:
    command = scan_command(folder, tmp_path / "x", dataset=str(folder / f"{dataset}.jsonl"))
    code, out, err = run(capsys, monkeypatch, [*command, "--json"])
    found = json.loads(out)
    assert (code, found["trials"], found["passed"], found["gate_rate"]) == (0, 24, 24, 1)
    expected = planted.build(**MODEL).heads[role]
    assert [head["head"] for head in found["heads"][:3]] == [f"{layer}-{head}" for layer, head in expected]
    assert all(head["ci_low"] <= head["score"] <= head["ci_high"] for head in found["heads"])
    assert "24 of 24 trials, 100% pass" in err
    assert HeadScores.from_pretrained(tmp_path / "x").found() == expected


def test_tables_say_the_best_heads_the_gate_and_where_the_files_are(capsys, monkeypatch, folder, tmp_path) -> None:
    code, out, _ = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x"))
    assert code == 0
    assert "Top 10 heads" in out and "4 of 4" in out and "split-half" in out and str(tmp_path / "x") in out


def test_interrupted_it_exits_with_130_and_resumes(capsys, monkeypatch, folder, tmp_path) -> None:
    real, calls = attempt.score_prompts, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    run(capsys, monkeypatch, scan_command(folder, tmp_path / "whole"))
    monkeypatch.setattr(attempt, "score_prompts", interrupted)
    code, _, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x"))
    assert code == 130 and "--resume continues" in err and "Traceback" not in err
    assert 3 <= len((tmp_path / "x" / "trials.jsonl").read_text().splitlines()) < 24
    code, _, _ = run(capsys, monkeypatch, [*scan_command(folder, tmp_path / "x"), "--resume"])
    assert code == 0
    for name in ("scores.safetensors", "config.json"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shards_are_merged(capsys, monkeypatch, folder, tmp_path) -> None:
    run(capsys, monkeypatch, scan_command(folder, tmp_path / "whole"))
    for part in ("1", "2"):
        code, _, _ = run(capsys, monkeypatch, scan_command(folder, tmp_path / part, shard=f"{part}/2"))
        assert code == 0
    merge = ["merge", str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "all"), "--json"]
    code, out, _ = run(capsys, monkeypatch, merge)
    assert code == 0 and json.loads(out)["passed"] == 24
    assert (tmp_path / "all/scores.safetensors").read_bytes() == (tmp_path / "whole/scores.safetensors").read_bytes()


def test_several_needles_to_a_context_find_the_same_heads_and_are_a_mode_of_their_own(
    capsys, monkeypatch, folder, tmp_path
) -> None:
    command = scan_command(folder, tmp_path / "x", depths=None, needles_per_context="4")
    code, out, _ = run(capsys, monkeypatch, [*command, "--json"])
    found = json.loads(out)
    assert (code, found["trials"], found["passed"]) == (0, 24, 24)
    scores = HeadScores.from_pretrained(tmp_path / "x")
    assert scores.found() == planted.build(**MODEL).heads["literal"]
    assert (scores.meta["contexts"], scores.meta["needles_per_context"]) == ("packed", 4)
    lines = [json.loads(line) for line in (tmp_path / "x" / "trials.jsonl").read_text().splitlines()]
    assert min(line["prefix_tokens"] for line in lines) > 50  # the context was computed once for its four questions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needles_per_context": "4"}, "depths: --needles-per-context spreads the needles evenly"),
        (
            {"needles_per_context": "17", "depths": None, "limit": "40"},
            "only 16 of the facts can stand together, not 17",
        ),
        (
            {"needles_per_context": "30", "depths": None},
            "limit: expected at least 60, the 30 needles of a context of each length",
        ),
        (
            {"dataset": "squad"},
            "dataset: expected numbers, bridges, niah, nolima, nolima-hard, planted or a .jsonl file, got 'squad'",
        ),
        ({"haystack": "nowhere"}, "haystack: expected essays, a text file or a folder, got 'nowhere'"),
        ({"lengths": "100:50:2"}, "lengths: expected A:B:N"),
        ({"lengths": "60:999999:2"}, "haystack: its "),
        ({"lengths": "5"}, "length: 5 tokens are too few"),
        ({"depths": "10,101"}, "depths: expected percentages"),
        ({"shard": "3/2"}, "shard: expected I/N"),
        ({"norm": "what"}, "norm"),
        ({"model": "./nowhere"}, "model: no folder './nowhere'"),
        ({"dtype": "int3"}, "dtype: expected"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, folder, tmp_path, changes: dict[str, str], message: str) -> None:
    code, out, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x", **changes))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("option", ["--max-new-tokens", "--max-thinking-tokens"])
def test_options_of_a_reply_are_refused_where_there_is_none(capsys, monkeypatch, folder, tmp_path, option) -> None:
    code, _, err = run(capsys, monkeypatch, [*scan_command(folder, tmp_path / "x"), option, "5"])
    assert code == 2 and f"{option[2:]}: only --protocol generate has replies" in err and err.count("\n") == 1


def test_a_scan_lets_the_model_answer_by_itself(capsys, monkeypatch, folder, tmp_path) -> None:
    command = [*scan_command(folder, tmp_path / "x"), "--protocol", "generate", "--max-new-tokens", "3", "--json"]
    code, out, _ = run(capsys, monkeypatch, command)
    found = json.loads(out)
    assert (code, found["passed"]) == (0, 24)
    assert HeadScores.from_pretrained(tmp_path / "x").found() == planted.build(**MODEL).heads["literal"]


def test_why_trials_failed_is_shown(capsys, monkeypatch, folder, tmp_path) -> None:
    real = attempt.score_prompts

    def fails(model, prompts, *arguments, **options):
        if any(prompt.spans[0][0] < 20 for prompt in prompts):
            raise RuntimeError("a bad day\nand more")
        return real(model, prompts, *arguments, **options)

    monkeypatch.setattr(attempt, "score_prompts", fails)
    code, out, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x"))
    assert code == 0 and "not scored: a bad day; scan --resume tries such trials again" in out
    assert "24 of 24 trials" in err


def test_a_chat_template_that_is_not_there_is_refused(capsys, monkeypatch, folder, tmp_path) -> None:
    code, _, err = run(capsys, monkeypatch, [*scan_command(folder, tmp_path / "x"), "--chat-template"])
    assert code == 2 and "chat template: this tokenizer has none; --no-chat-template" in err and err.count("\n") == 1


def test_a_line_of_a_data_set_is_named(capsys, monkeypatch, folder, tmp_path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"needle": "a b .", "question": "c"}\n')
    code, _, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x", dataset=str(tmp_path / "mine.jsonl")))
    assert code == 2 and "mine.jsonl, line 1: field 'answer' is missing" in err and err.count("\n") == 1


def test_an_answer_that_the_haystack_gives_away_is_refused(capsys, monkeypatch, folder, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("Paris . " + (folder / "haystack.txt").read_text())
    command = scan_command(
        folder, tmp_path / "x", dataset=str(folder / "bridges.jsonl"), haystack=str(tmp_path / "text.txt")
    )
    code, _, err = run(capsys, monkeypatch, command)
    assert code == 2 and "gives the answer of bridges-1 away: 'Paris'" in err and err.count("\n") == 1


def test_prompts_longer_than_the_model_has_positions_are_refused(capsys, monkeypatch, folder, tmp_path) -> None:
    import shutil

    shutil.copytree(folder / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 100}))
    code, _, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x", model=str(tmp_path / "model")))
    assert code == 2 and "lengths: a prompt of 121 tokens is longer than the model's 100 positions" in err


def test_a_folder_that_holds_a_scan_is_refused_before_the_work(capsys, monkeypatch, folder, tmp_path) -> None:
    run(capsys, monkeypatch, scan_command(folder, tmp_path / "x"))
    code, _, err = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x"))
    assert code == 2 and "already holds a scan; --resume continues it" in err
    code, _, err = run(capsys, monkeypatch, [*scan_command(folder, tmp_path / "x", limit="20"), "--resume"])
    assert (
        code == 2
        and "trials that are not among those asked for" in err
        and "limit was 24, is 20" in err
        and err.count("\n") == 1
    )


def test_merging_what_is_no_scan_is_refused(capsys, monkeypatch, tmp_path) -> None:
    code, _, err = run(capsys, monkeypatch, ["merge", str(tmp_path), "--out", str(tmp_path / "all")])
    assert code == 2 and "is no scan" in err and err.count("\n") == 1


def test_every_detector_is_shown_with_its_best_heads(capsys, monkeypatch, folder, tmp_path) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    _, out, _ = run(capsys, monkeypatch, scan_command(folder, tmp_path / "x"))
    literal = " ".join(f"L{layer}H{head}" for layer, head in planted.build(**MODEL).heads["literal"])
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") == 4}
    for label in ("LOCOS", "LOCOS frozen", "LOCOS against a foil", "QRHead", "HeadKV anchors", "Wu copy score"):
        assert label in rows
    assert literal in rows["LOCOS"] and literal.split()[0] in rows["Wu copy score"]
