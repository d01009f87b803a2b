"""`locos-fast ablate`: curves from a scan's folder or a list, and one clear line for everything that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from locos_fast import planted
from locos_fast.scans import sweep as sweeps
from tests.oracles.entry_point import run

MODEL = {"layers": 4}
COUNT = len(planted.build(**MODEL).heads["literal"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted")
    planted.build(**MODEL).save_pretrained(path / "model")
    return path


def command(folder: Path, out: Path, **changes: str | None) -> list[str]:
    options = {
        "model": str(folder / "model"),
        "heads": "1-3,2-11",
        "dataset": "planted:literal",
        "lengths": "60",
        "depths": "2",
        "limit": "4",
        "k": "1,2",
        "draws": "2",
        "device": "cpu",
        "out": str(out),
    } | changes
    return ["ablate", *(x for name, value in options.items() if value is not None for x in (f"--{name}", value))]


def test_a_scans_heads_are_taken_away_and_compared(capsys, monkeypatch, folder, tmp_path) -> None:
    scan = ["scan", *command(folder, tmp_path / "scan", heads=None, k=None, draws=None)[1:]]
    assert run(capsys, monkeypatch, [*scan])[0] == 0
    given = command(folder, tmp_path / "x", heads=str(tmp_path / "scan"), k=str(COUNT))
    code, out, err = run(capsys, monkeypatch, [*given])
    assert code == 0, err
    assert "LOCOS" in out and "layer-matched" in out and "percentile" in out and (tmp_path / "x/ablation.png").exists()
    code, out, _ = run(capsys, monkeypatch, [*given, "--resume", "--json"])
    found = json.loads(out)
    of_locos = [p["value"] for p in found["points"] if (p["set"], p["metric"]) == ("score", "accuracy")]
    assert (code, of_locos, found["baseline"]["passed"]) == (0, [0.0], 4)


def test_heads_that_were_chosen_on_the_same_facts_are_warned_of(capsys, monkeypatch, folder, tmp_path) -> None:
    same = command(folder, tmp_path / "scan", heads=None, k=None, draws=None, seed="1")
    assert run(capsys, monkeypatch, ["scan", *same[1:]])[0] == 0
    _, _, err = run(capsys, monkeypatch, [*command(folder, tmp_path / "x", heads=str(tmp_path / "scan"))])
    assert "the heads were chosen on a scan of the same facts; another --seed draws others" in err


def test_a_list_of_heads_is_taken_in_its_order(capsys, monkeypatch, folder, tmp_path) -> None:
    code, out, err = run(capsys, monkeypatch, [*command(folder, tmp_path / "x"), "--json"])
    assert code == 0, err
    assert {p["set"] for p in json.loads(out)["points"]} == {"given", "bottom", "layer-matched", "random"}
    plan = json.loads((tmp_path / "x" / "sweep.json").read_text())
    assert plan["points"][0]["heads"] == [[1, 3]]


def test_interrupted_it_exits_with_130(capsys, monkeypatch, folder, tmp_path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "given_answers", interrupted)
    code, _, err = run(capsys, monkeypatch, [*command(folder, tmp_path / "x")])
    assert code == 130 and "--resume continues" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": "1-3,99-1"}, "99-1"),
        ({"heads": "nowhere"}, "heads: expected a list such as 18-6,23-2, a score folder or a file, got 'nowhere'"),
        ({"k": "3"}, "k: expected 1 to 2, the heads with a value in 1-3,2-11, got 3"),
        ({"k": "0"}, "k: expected numbers of heads with commas between, got '0'"),
        ({"k": "a"}, "k: expected numbers"),
        ({"detectors": "wu"}, "detectors: only a scan's folder has arrays to choose from"),
        ({"mode": "what"}, "mode: expected one of output-zero"),
        ({"lengths": "5"}, "length: expected"),
        ({"dataset": "nothing"}, "dataset: expected"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, folder, tmp_path, changes: dict[str, str], message: str) -> None:
    code, out, err = run(capsys, monkeypatch, [*command(folder, tmp_path / "x", **changes)])
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err


def test_a_folder_that_holds_a_sweep_is_refused_before_the_model_is_loaded(
    capsys, monkeypatch, folder, tmp_path
) -> None:
    assert run(capsys, monkeypatch, [*command(folder, tmp_path / "x")])[0] == 0
    given = command(folder, tmp_path / "x", model="./nowhere")
    code, _, err = run(capsys, monkeypatch, [*given])
    assert code == 2 and "already holds a sweep; --resume continues it" in err and err.count("\n") == 1
