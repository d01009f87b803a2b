"""The needle test of Wu et al. is read as its folder is published, or refused with file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from locos_fast.prompts.datasets import read_dataset
from locos_fast.prompts.datasets.niah import part_of
from locos_fast.prompts.needle_grid import foil_of
from tests.oracles.published_data import NIAH_NEEDLES, write_niah


def test_needle_i_is_hidden_in_part_i_and_its_copied_part_is_answer_and_evidence(tmp_path: Path) -> None:
    data = read_dataset(f"niah:{write_niah(tmp_path)}")
    assert [fact.haystack for fact in data.facts] == list(data.texts) == ["part1", "part2", "part3"]
    assert [fact.answer for fact in data.facts] == [entry["real_needle"] for entry in NIAH_NEEDLES]
    assert [fact.evidence for fact in data.facts] == [
        "climb the lighthouse at noon.",
        "as its oven has to cool down.",  # other capitals
        "both ledgers, the red and the green one, had been filled in twice",  # most of its words
    ]
    assert data.repeated


def test_the_task_is_asked_as_it_is_published(tmp_path: Path) -> None:
    fact = read_dataset(f"niah:{write_niah(tmp_path)}").facts[0]
    asked = fact.template.format(haystack="HAY", question="Why ?")
    assert asked == "HAYBased on the content of the book, Question: Why ?\nAnswer:"


def test_plain_text_is_read_first_and_else_the_rows_with_text(tmp_path: Path) -> None:
    folder = write_niah(tmp_path)
    (folder / "part1" / "p1.plain.txt").write_text("Plain.", encoding="utf-8")
    (folder / "part2" / "p1.txt").write_text(
        json.dumps({"rows": [{"row": {"text": "One."}}, {"row": {"text": ""}}, {"row": {}}, {"row": {"text": "Two."}}]})
    )
    texts = read_dataset(f"niah:{folder}").texts
    assert (texts["part1"], texts["part2"]) == ("Plain.", "One.\n\nTwo.")


def test_a_foil_is_what_another_needle_would_have_answered(tmp_path: Path) -> None:
    facts = read_dataset(f"niah:{write_niah(tmp_path)}").facts
    assert [foil_of(fact, facts) for fact in facts] == [facts[1].answer, facts[2].answer, facts[0].answer]


@pytest.mark.parametrize(
    ("needle", "copied", "found"),
    [
        ("It is red.", "red", "red"),
        ("Because it rains. It is wet because it rains.", "because it rains.", "because it rains."),
        ("She left because he sang.", "Because he sang.", "because he sang."),
        ("The blue key, rusty and old, opens it.", "blue key (rusty and old)", "blue key, rusty and old"),
        ("Sail at dawn.", "sail, at the break of dawn, with the tide of the new moon", None),
        ("Sail at dawn.", "walk home", None),
    ],
)
def test_where_a_copied_part_stands(needle: str, copied: str, found: str | None) -> None:
    span = part_of(needle, copied)
    assert (span and needle[slice(*span)]) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"real_needle": None}, "field 'real_needle': expected text, got null"),
        ({"question": " "}, "field 'question': expected text"),
        ({"real_needle": "walk home"}, "field 'real_needle': expected a part of the needle, got 'walk home'"),
    ],
)
def test_a_line_that_is_no_needle_is_named(tmp_path: Path, change: dict, message: str) -> None:
    folder = write_niah(tmp_path, [NIAH_NEEDLES[0], {**NIAH_NEEDLES[1], **change}])
    with pytest.raises(ValueError, match=f"dataset: .*needles.jsonl, line 2: {message}"):
        read_dataset(f"niah:{folder}")


def test_a_missing_field_and_a_file_without_needles_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needles.jsonl, line 1: field 'question' is missing"):
        read_dataset(f"niah:{write_niah(tmp_path, [{'needle': 'a b'}])}")
    with pytest.raises(ValueError, match=r"needles.jsonl holds no needles"):
        read_dataset(f"niah:{write_niah(tmp_path, [])}")


@pytest.mark.parametrize("file", ["needles.jsonl", "part2/p1.txt"])
def test_a_missing_file_is_named_with_the_way_to_get_it(tmp_path: Path, file: str) -> None:
    folder = write_niah(tmp_path)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=rf"dataset: niah: .* has no .*{file}; by hand: .*Retrieval_Head") as error:
        read_dataset(f"niah:{folder}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["no json", "[1]", '{"rows": [{"text": "x"}]}', '{"rows": []}'])
def test_a_text_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    folder = write_niah(tmp_path)
    (folder / "part3" / "p1.txt").write_text(text)
    with pytest.raises(ValueError, match=r"dataset: .*part3/p1.txt.* (no JSON|expected|holds no text)"):
        read_dataset(f"niah:{folder}")
