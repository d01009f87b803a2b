"""What commands print and write: complete numbers, texts of others as they are, nothing lost when a file cannot be
written, and what the model itself would have answered."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest
import torch

from locos_fast.cli import options
from locos_fast.cli import score as score_command
from locos_fast.report import pictures
from locos_fast.report.display import shown
from locos_fast.scoring.head_scores import HeadScores
from tests.cli import test_bad_inputs
from tests.cli.test_bad_inputs import Place
from tests.cli.test_cli import run

tiny, place = test_bad_inputs.tiny, test_bad_inputs.place  # fixtures


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\x1b[31mb", r"a\x1b[31mb"), ("a\nb", r"a\nb"), ("\u202ex", r"\u202ex"), ("caf\udce9", r"caf\udce9")]
    + [(text, text) for text in ("[red]x[/red]", "語 é", "a b")],
)
def test_only_what_a_terminal_obeys_is_escaped(text: str, expected: str) -> None:
    assert shown(text) == expected


@pytest.mark.parametrize("command", ["score", "attribute"])
def test_the_answer_of_the_model_itself_is_said(capsys, monkeypatch, place: Place, command):
    _, out, _ = run(capsys, monkeypatch, [*place.command(command), "--json"])
    meta = json.loads(out)["meta"]
    assert len(meta["predicted_tokens"]) == len(meta["predicted_ids"]) == len(meta["answer_ids"]) == 3
    assert meta["answer_is_predicted"] == (meta["predicted_ids"] == meta["answer_ids"]) is False
    _, out, _ = run(capsys, monkeypatch, [*place.command(command), "--overwrite"])
    [note] = [line for line in out.splitlines() if line.startswith("note:")]
    step = [a != b for a, b in zip(meta["predicted_ids"], meta["answer_ids"], strict=True)].index(True)
    assert f"would write {meta['predicted_tokens'][step]!r} instead of {meta['answer_tokens'][step]!r}" in note
    own = " ".join(meta["predicted_tokens"][: step + 1])
    _, out, _ = run(capsys, monkeypatch, [*place.command(command, answer=own), "--overwrite", "--json"])
    assert json.loads(out)["meta"]["answer_is_predicted"] is (step == 0)


@pytest.mark.parametrize("width", [30, 60, 80])
@pytest.mark.parametrize("command", ["score", "attribute", "doctor"])
def test_a_narrow_terminal_cuts_no_number(capsys, monkeypatch, place: Place, command, width):
    monkeypatch.setattr(options.console, "_width", width)
    code, out, _ = run(capsys, monkeypatch, place.command(command))
    table = [line for line in out.splitlines() if line.startswith(("│", "┃"))]
    numbers = [
        cell for line in table for cell in line.split("│")[1 : 4 if command == "attribute" else -1]
    ]  # its texts may be cut
    assert (code, bool(table), any("…" in number for number in numbers)) == (0, True, False)


def test_a_prompt_may_come_from_a_pipe(capsys, monkeypatch, place: Place):
    pipe = place.folder / "pipe"
    os.mkfifo(pipe)
    text = (place.folder / "context.txt").read_text()
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    code, _, err = run(capsys, monkeypatch, place.command("score", context=pipe))
    writer.join()
    assert (code, err) == (0, "")


def test_a_picture_that_fails_is_a_warning_and_costs_no_scores(capsys, monkeypatch, place: Place):
    def fail(*args, **kwargs):
        raise RuntimeError("no ink")

    monkeypatch.setattr(pictures, "save_heat_map", fail)
    code, out, err = run(capsys, monkeypatch, place.command("score"))
    assert (code, "no ink" in err, "LOCOS score" in out) == (0, True, True)
    assert HeadScores.from_pretrained(place.out).score.shape == (2, 4)


def test_scores_that_cannot_be_written_are_printed_all_the_same(capsys, monkeypatch, place: Place):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(HeadScores, "save_pretrained", fail)
    code, out, err = run(capsys, monkeypatch, [*place.command("score"), "--json"])
    assert (code, err) == (2, "error: disk full\n")
    assert len(json.loads(out)["heads"]) == 8


def test_verify_says_that_it_passed(capsys, monkeypatch, place: Place):
    _, out, _ = run(capsys, monkeypatch, [*place.command("score"), "--verify"])
    assert "verified: the recording reproduces the outputs of the heads" in out
    assert HeadScores.from_pretrained(place.out).meta["verified"] is True


def test_planted_takes_any_name_and_writes_files_for_the_group_too(capsys, monkeypatch, tmp_path):
    (tmp_path / "pl[").mkdir()
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, monkeypatch, ["planted", "pl[/red]"])
    assert (code, out, err) == (0, "planted model in pl[/red]\n", "")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "pl[" / "red]").iterdir()}
    assert len(modes) == 1
    assert run(capsys, monkeypatch, ["planted", "pl[/red]", "--overwrite"])[0] == 0


def test_out_of_memory_on_a_cpu_is_one_line(capsys, monkeypatch, place: Place):
    def fail(*args):
        torch.empty(2**60, dtype=torch.uint8)  # more than any machine has

    monkeypatch.setattr(score_command, "load_model", fail)
    code, _, err = run(capsys, monkeypatch, place.command("score"))
    assert (code, len(err.splitlines()), "error: memory:" in err) == (2, 1, True)
