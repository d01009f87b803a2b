"""`score` composes like a scan does: in a chat template, the reply begun, so that the model itself answers."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_cli import arguments, planted, run  # noqa: F401  (planted is a fixture)
from tests.cli.test_real_model import numbers  # noqa: F401  (a fixture)

NEEDLE = "The special magic number for Laura is 48213."
CONTEXT = (
    f"The weather has been dry for weeks. {NEEDLE} The market opens at eight. Nobody remembers who planted the trees."
)
LEAD = "The special magic number for Laura is"
ASKED = ["--question", "What is the special magic number for Laura?", "--answer", "48213"]


@pytest.mark.real
@pytest.mark.parametrize("depth", [None, "50"])
def test_in_its_template_and_with_a_lead_smollm2_answers_right(numbers, tmp_path, depth):  # noqa: F811
    needle = f"{NEEDLE} "
    (tmp_path / "context.txt").write_text(CONTEXT if depth is None else CONTEXT.replace(needle, ""))
    given = ["--context", str(tmp_path / "context.txt"), "--needle", NEEDLE, *ASKED]
    placed = [] if depth is None else ["--depth", depth]
    meta = numbers("score", *given, *placed, "--chat-template", "--lead", LEAD, "--out", str(tmp_path / "out"))["meta"]
    assert meta["answer_is_predicted"] and "".join(meta["predicted_tokens"]) == " 48213"
    assert "".join(meta["needle_tokens"]).strip() == NEEDLE
    assert (meta["chat_template"], meta["lead"]) == (True, LEAD)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "chat template" in saved["protocol"] and saved["lead"] == LEAD


@pytest.mark.real
def test_without_both_the_prompt_is_what_stands_there_and_the_template_is_pointed_at(capsys, monkeypatch, tmp_path):
    (tmp_path / "context.txt").write_text(CONTEXT)
    command = ["score", "--model", "smollm2", "--device", "cpu", "--context", str(tmp_path / "context.txt")]
    code, out, _ = run(capsys, monkeypatch, [*command, "--needle", NEEDLE, *ASKED[:2], "--answer", "Trees"])
    assert code == 0
    assert "the model itself would not have answered this" in out
    assert "--chat-template asks in it" in out


def test_a_tokenizer_without_template_is_one_line(capsys, monkeypatch, planted):  # noqa: F811
    code, _, err = run(capsys, monkeypatch, [*arguments(planted), "--chat-template"])
    assert (code, "chat template: this tokenizer has none" in err) == (2, True)
    assert "Traceback" not in err


def test_the_lead_stands_in_front_of_the_answer(capsys, monkeypatch, planted):  # noqa: F811
    from locos_fast.planted.vocabulary import FILLERS

    _, plain, _ = run(capsys, monkeypatch, [*arguments(planted), "--json"])
    code, out, _ = run(capsys, monkeypatch, [*arguments(planted), "--json", "--lead", " ".join(FILLERS[:3])])
    assert code == 0
    before, after = (json.loads(text)["meta"] for text in (plain, out))
    assert after["tokens"] == before["tokens"] + 3
    assert (before["lead"], before["chat_template"]) == ("", False)
    assert "reply begun with a lead" in after["protocol"]
