"""`locos-fast data get`: downloads what is on the hub, and says in one line what to put where when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from locos_fast.prompts.datasets import published
from tests.oracles.entry_point import run
from tests.oracles.published_data import write_nolima


@pytest.fixture
def hub(monkeypatch):
    """A hub that hands out a small NoLiMa; returns the calls it got."""
    calls = []

    def snapshot_download(repo_id, *, repo_type, local_dir, allow_patterns):
        calls.append((repo_id, repo_type, Path(local_dir), allow_patterns))
        write_nolima(Path(local_dir))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_nolima_is_downloaded_and_its_licence_said(capsys, monkeypatch, hub, tmp_path) -> None:
    code, out, err = run(capsys, monkeypatch, ["data", "get", "nolima", "--out", str(tmp_path / "x")])
    assert (code, err) == (0, "")
    ((repository, kind, folder, patterns),) = hub
    assert (repository, kind, folder) == ("amodaresi/NoLiMa", "dataset", tmp_path / "x")
    assert "needlesets/needle_set.json" in patterns and "haystack/rand_shuffle/*.txt" in patterns
    assert "Adobe Research licence" in out and "non-commercial" in out
    assert f"--dataset nolima:{tmp_path / 'x'}" in out


def test_without_a_folder_it_goes_where_scan_looks(capsys, monkeypatch, hub, tmp_path) -> None:
    monkeypatch.setattr(published.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    code, out, _ = run(capsys, monkeypatch, ["data", "get", "nolima"])
    assert code == 0 and hub[0][2] == tmp_path / "locos_fast/datasets/nolima" == published.NOLIMA.folder
    assert "`locos-fast scan --dataset nolima ...`" in out


def test_niah_says_what_to_put_where_and_that_it_has_no_licence(capsys, monkeypatch, hub, tmp_path) -> None:
    code, out, err = run(capsys, monkeypatch, ["data", "get", "niah", "--out", str(tmp_path / "x")])
    assert code == 2 and not hub and "no licence file" in out
    assert "github.com/nightdessert/Retrieval_Head" in err and "needles.jsonl" in err and str(tmp_path / "x") in err
    assert err.count("\n") == 1


def test_a_download_that_fails_or_is_incomplete_says_what_to_do_by_hand(capsys, monkeypatch, tmp_path) -> None:
    def fails(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    code, _, err = run(capsys, monkeypatch, ["data", "get", "nolima", "--out", str(tmp_path / "x")])
    assert code == 2 and err.count("\n") == 1
    assert "cannot download amodaresi/NoLiMa; by hand: from https://huggingface.co" in err and "(no route)" in err
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (tmp_path / "x").mkdir())
    code, _, err = run(capsys, monkeypatch, ["data", "get", "nolima", "--out", str(tmp_path / "x")])
    assert code == 2 and "came without needlesets/needle_set.json; by hand" in err and err.count("\n") == 1


@pytest.mark.parametrize("what", ["new", "other files"])
def test_offline_it_is_one_line(tmp_path, what: str) -> None:
    target = tmp_path / "x"
    if what == "other files":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "locos_fast", "data", "get", "nolima", "--out", str(target)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "by hand: from https://huggingface.co/datasets/amodaresi/NoLiMa put" in lines[0]
    assert f"into {target}" in lines[0]  # all of it: the reason, which may be cut off, comes behind
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("get", "squad"), "data: expected niah or nolima, got 'squad'"),
        (("get", "nolima", "--out", ""), "expected a folder, got nothing"),
        (("get", "nolima", "--out", __file__), "is a file, not a folder"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, hub, command: tuple[str, ...], message: str) -> None:
    code, out, err = run(capsys, monkeypatch, ["data", *command])
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err
