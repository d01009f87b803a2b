"""NoLiMa is read as it is published, its characters drawn with the seed, or refused with file, entry and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from locos_fast.prompts.datasets import read_dataset
from locos_fast.prompts.needle_grid import foil_of, given_away
from tests.oracles.published_data import CHARACTERS, NOLIMA_ENTRIES, TASK, write_nolima


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_nolima(tmp_path / "nolima")


def test_slots_are_filled_and_the_answer_is_a_character(folder: Path) -> None:
    fact = next(f for f in read_dataset(f"nolima:{folder}").facts if f.id.startswith("0101-T02"))
    assert fact.answer in CHARACTERS
    assert fact.needle == f"{fact.answer} rents a room beside the Alhambra."
    assert fact.question == "Who rents a room in Granada?"
    assert (fact.template, fact.group, fact.about) == (TASK, "0101", fact.answer)


def test_entry_i_is_hidden_in_book_i_modulo_their_number_and_entries_take_turns(folder: Path) -> None:
    facts = read_dataset(f"nolima:{folder}").facts
    assert [fact.group for fact in facts] == ["0101", "0102", "0103", "0101", "0102", "0101"]
    assert [fact.haystack for fact in facts[:3]] == ["rand_book_1", "rand_book_2", "rand_book_1"]
    assert read_dataset(f"nolima:{folder}").texts["rand_book_2"].startswith("Book 2.")


def test_books_are_counted_by_their_numbers(tmp_path: Path) -> None:
    texts = read_dataset(f"nolima:{write_nolima(tmp_path, books=11)}").texts
    assert list(texts) == [f"rand_book_{number}" for number in range(1, 12)]


def test_the_flat_layout_is_read_too(tmp_path: Path, folder: Path) -> None:
    flat = read_dataset(f"nolima:{write_nolima(tmp_path / 'flat', flat=True)}")
    assert flat == read_dataset(f"nolima:{folder}")


def test_the_hard_set_is_its_own(folder: Path) -> None:
    hard = read_dataset(f"nolima-hard:{folder}")
    assert (hard.name, len(hard.facts)) == ("nolima-hard", 3)


def test_a_question_type_leaves_out_entries_that_lack_it(folder: Path) -> None:
    data = read_dataset(f"nolima:{folder}", question_type="twohop")
    assert {fact.group for fact in data.facts} == {"0101"}
    assert {fact.question for fact in data.facts} == {
        f"Who rents a room in {c}?" for c in ("Belgium", "Spain", "Italy")
    }
    assert data.options == {"question_type": "twohop", "characters": 1}


def test_characters_are_drawn_with_the_seed(folder: Path) -> None:
    def answers(seed: int, characters: int = 1) -> list[str]:
        return [fact.answer for fact in read_dataset(f"nolima:{folder}", seed=seed, characters=characters).facts]

    assert answers(3) == answers(3)
    drawn = [tuple(answers(seed)) for seed in range(20)]
    assert len(set(drawn)) > 10  # not always the first ones
    assert {name for names in drawn for name in names} == set(CHARACTERS)
    assert len(answers(0, 3)) == 18 and len({*answers(0, 99)}) == 4


def test_a_foil_is_another_character_of_the_entry(folder: Path) -> None:
    for characters in (1, 2, 4):
        facts = read_dataset(f"nolima:{folder}", characters=characters).facts
        for fact in facts:
            assert fact.foil in CHARACTERS and fact.foil != fact.answer
            assert foil_of(fact, facts) in set(CHARACTERS) - {fact.answer}


def test_a_name_in_the_book_gives_the_answer_away_but_a_word_that_begins_like_it_does_not(folder: Path) -> None:
    fact = read_dataset(f"nolima:{folder}").facts[0]
    assert given_away(fact, f"Then came {fact.answer}.", said=True) == fact.answer
    assert given_away(fact, f"Then came {fact.answer}.") is None
    assert given_away(fact, f"{fact.answer}ly {fact.answer.lower()}", said=True) is None


@pytest.mark.parametrize(("given", "message"), [("threehop", "expected onehop or twohop or twohop2, got 'threehop'")])
def test_an_unknown_question_type_is_refused(folder: Path, given: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^question-type: {message}"):
        read_dataset(f"nolima:{folder}", question_type=given)


def test_a_question_type_that_no_entry_has_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^question-type: no entry of .*needle_set.json has .* twohop2"):
        read_dataset(f"nolima:{folder}", question_type="twohop2")


def changed(**fields) -> list[dict]:
    entry = {**NOLIMA_ENTRIES[1], **fields}
    return [NOLIMA_ENTRIES[0], {name: value for name, value in entry.items() if value is not ...}]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": 1}, r"expected a list of entries"),
        ([], r"expected a list of entries"),
        ([NOLIMA_ENTRIES[0], 3], r", entry 2: expected an object, got 3"),
        (changed(tests=...), r", entry 2: field 'tests' is missing"),
        (changed(id=7), r", entry 2: field 'id': expected text, got 7"),
        (changed(questions=[]), r", entry 2: field 'questions': expected an object"),
        (changed(questions={"onehop": ""}), r", entry 2, questions: field 'onehop': expected text"),
        (changed(character_set=[1]), r", entry 2: field 'character_set': expected names"),
        (changed(task_template="{question}"), r", entry 2: field 'task_template': template: expected {haystack}"),
        (changed(tests={"T01": []}), r", entry 2, test T01: expected an object"),
        (changed(tests={"T01": {}}), r", entry 2, test T01: field 'input_args' is missing"),
        (changed(tests={"T01": {"input_args": ["x"]}}), r", entry 2, test T01, field 'onehop': .2. is none of its 1"),
    ],
)
def test_an_entry_that_is_none_is_named(tmp_path: Path, entries, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^dataset: .*needle_set.json.*{message}"):
        read_dataset(f"nolima:{write_nolima(tmp_path, entries)}")


@pytest.mark.parametrize("what", ["needlesets/needle_set.json", "haystack/rand_shuffle/rand_book_*.txt"])
def test_a_missing_file_is_named_with_the_way_to_get_it(folder: Path, what: str) -> None:
    for file in folder.glob(what):
        file.unlink()
    with pytest.raises(ValueError, match=r"has no .*; `locos-fast data get nolima --out .*` gets it") as error:
        read_dataset(f"nolima:{folder}")
    assert what in str(error.value) and "\n" not in str(error.value)


def test_an_empty_book_is_named(folder: Path) -> None:
    (folder / "haystack/rand_shuffle/rand_book_2.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"dataset: .*rand_book_2.txt holds no text"):
        read_dataset(f"nolima:{folder}")
