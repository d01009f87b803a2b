"""`locos-fast scan --shard` and `merge`: a part without results is a part."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from locos_fast.cli import app as cli
from tests.oracles.planted_scan import scan_command, write_planted_scan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted")
    write_planted_scan(path)
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the entry point in this process; returns exit code, stdout, stderr."""

    def call(command: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["locos-fast", *command])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def test_an_empty_shard_is_no_error_and_merge_says_what_is_missing(run, folder, tmp_path) -> None:
    part = {"limit": "2", "depths": "2"}
    code, out, err = run([*scan_command(folder, tmp_path / "1", shard="1/3", **part), "--json"])
    assert code == 0 and json.loads(out)["passed"] == 0 and json.loads(out)["statuses"] == {"open": 2}
    assert "no trial counts (2 open)" in err and "merge puts it together" in err
    code, _, _ = run(scan_command(folder, tmp_path / "2", shard="2/3", **part))
    assert code == 0
    code, out, err = run(["merge", str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "all"), "--json"])
    assert code == 0 and json.loads(out)["passed"] == 1
    assert "1 of 2 trials are missing" in err
    code, _, err = run(["merge", str(tmp_path / "1"), "--out", str(tmp_path / "nothing")])
    assert code == 2 and "merge: in all parts together no trial counts (2 open)" in err and err.count("\n") == 1
    assert not (tmp_path / "nothing").exists()


def test_a_whole_scan_in_which_nothing_counts_is_an_error(run, folder, tmp_path) -> None:
    lines = [json.loads(line) for line in (folder / "literal.jsonl").read_text().splitlines()]
    wrong = [line | {"answer": other["answer"]} for line, other in zip(lines, [*lines[1:], lines[0]], strict=True)]
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(line) + "\n" for line in wrong))
    command = scan_command(folder, tmp_path / "x", dataset=str(tmp_path / "wrong.jsonl"), limit="2")
    code, _, err = run(command)
    assert code == 2 and "no trial counts (2 gated)" in err


def test_more_trials_are_added_to_a_scan(run, folder, tmp_path) -> None:
    one_cell = {"lengths": "100", "depths": "1"}
    assert run(scan_command(folder, tmp_path / "x", **one_cell, limit="3"))[0] == 0
    code, out, err = run([*scan_command(folder, tmp_path / "x", **one_cell, limit="6"), "--resume", "--json"])
    assert code == 0 and json.loads(out)["passed"] == 6, err
    code, _, err = run([*scan_command(folder, tmp_path / "x", **one_cell, limit="4"), "--resume"])
    assert code == 2 and "limit was 6, is 4" in err and "merge" in err and err.count("\n") == 1


def test_a_folder_that_was_moved_goes_on(run, folder, tmp_path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "moved")
    assert run(scan_command(folder, tmp_path / "x", shard="1/2"))[0] == 0
    moved = scan_command(tmp_path / "moved", tmp_path / "x")
    code, out, err = run([*moved, "--resume", "--json"])
    assert code == 0 and json.loads(out)["passed"] == 24, err
