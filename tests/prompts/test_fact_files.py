"""Needles of one's own: read, or refused with file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from locos_fast.prompts.fact_files import read_facts
from locos_fast.prompts.haystacks import read_haystack
from locos_fast.prompts.needle_prompt import Fact

GOOD = {"needle": "Laura lives in Lisbon.", "question": "Where does Laura live?", "answer": "Lisbon"}


def written(folder: Path, *lines: str) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_facts_are_read_in_order_and_empty_lines_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(GOOD), "", json.dumps({**GOOD, "lead": " Laura lives in ", "group": "city"}))
    assert read_facts(path) == [
        Fact("mine-1", *GOOD.values()),
        Fact("mine-2", *GOOD.values(), lead="Laura lives in", group="city"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[]", "line 2: expected an object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "answer"}), "line 2: field 'answer' is missing"),
        (json.dumps({**GOOD, "answer": 5}), "line 2: field 'answer': expected text, got 5"),
        (json.dumps({**GOOD, "needle": " "}), "line 2: field 'needle': expected text"),
        (json.dumps({**GOOD, "led": "x"}), "line 2: unknown field 'led'"),
    ],
)
def test_a_line_that_is_no_fact_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"dataset: .*mine.jsonl, {message}"):
        read_facts(written(tmp_path, json.dumps(GOOD), line))


def test_a_file_without_facts_or_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no needles"):
        read_facts(written(tmp_path, "", ""))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_facts(tmp_path / "b.jsonl")


def test_a_haystack_is_a_file_or_the_texts_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    assert read_haystack(str(tmp_path)) == "first\n\nsecond"
    assert read_haystack(str(tmp_path / "b.txt")) == "second"


def test_other_haystacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="haystack: expected essays"):
        read_haystack(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"holds no \.txt files with text"):
        read_haystack(str(tmp_path))
