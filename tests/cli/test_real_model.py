"""Every command that takes a model takes the built-in one by its name, and its parts add up."""

import json
import sys

import pytest

from locos_fast.cli import app as cli

NEEDLE = "Laura lives in the city of Lisbon."
CONTEXT = (
    f"The weather has been dry for weeks. {NEEDLE} The market opens at eight. Nobody remembers who planted the trees."
)
LEAD = "Laura lives in the country of"
ROUNDING = 1e-5  # of float32 sums over 30 layers, relative to the sum of absolute parts; a forgotten norm costs 1e-1

pytestmark = pytest.mark.real


@pytest.fixture
def numbers(capsys, monkeypatch):
    """Run a command on smollm2 with --json; what it prints."""

    def run(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["locos-fast", *arguments, "--model", "smollm2", "--device", "cpu", "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return json.loads(capsys.readouterr().out)

    return run


def test_doctor_calls_all_thirty_layers_exact(numbers):
    result = numbers("doctor")
    assert len(result["layers"]) == 30
    assert result["verdict"] == "exact" and result["residual"] < ROUNDING


def test_score_answers_the_country_of_a_city_and_adds_up(numbers, tmp_path):
    (tmp_path / "context.txt").write_text(CONTEXT)
    asked = ["--needle", NEEDLE, "--question", LEAD, "--answer", "Portugal", "--norm", "frozen"]
    result = numbers("score", "--context", str(tmp_path / "context.txt"), *asked)
    meta = result["meta"]
    assert meta["model"] == "smollm2" and meta["answer_tokens"] == [" Portugal"]
    assert meta["predicted_ids"] == meta["answer_ids"]
    assert meta["completeness"]["overall"] < ROUNDING


def test_attribute_finds_that_one_head_wrote_the_answer_from_the_needle(numbers, tmp_path):
    (tmp_path / "prompt.txt").write_text(f"{CONTEXT}\n\n{LEAD}")
    asked = ["--answer", "Portugal", "--out", str(tmp_path / "out")]
    strongest = numbers("attribute", "--prompt", str(tmp_path / "prompt.txt"), *asked)["pairs"][0]
    assert strongest["text"].strip() == NEEDLE
