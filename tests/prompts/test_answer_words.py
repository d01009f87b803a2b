"""An answer in a text: the word itself, its forms, and the words that only look like it."""

from __future__ import annotations

import pytest

from locos_fast.prompts.answer_words import as_a_word, in_another_form
from locos_fast.prompts.needle_prompt import Fact


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("Canada", "Canadians"),
        ("Chile", "Chilean"),
        ("China", "Chinese"),
        ("Cuba", "Cuban"),
        ("Egypt", "Egyptian"),
        ("Finland", "Finnish"),
        ("Germany", "Germans"),
        ("Greece", "Greeks"),
        ("Hungary", "Hungarian"),
        ("Iraq", "Iraqi"),
        ("Italy", "ITALIAN"),
        ("London", "Londoners"),
        ("Morocco", "Moroccan"),
        ("Norway", "Norwegian"),
        ("Peru", "Peruvian"),
        ("Portugal", "Portuguese"),
        ("Spain", "Spanish"),
        ("Turkey", "Turkish"),
    ],
)
def test_a_form_of_an_answer_is_found(answer: str, form: str) -> None:
    assert in_another_form(answer, f"It was {form}, they said.") == form
    assert as_a_word(answer, f"It was {form}, they said.") is None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("Athens", "atheist"),
        ("Cairo", "cairn"),
        ("Canada", "canaries canal"),
        ("Chile", "children chilly chili"),
        ("China", "chin chink machine"),
        ("France", "Franz frank franchise"),
        ("Georgia", "George"),
        ("Greece", "green greenish greed"),
        ("India", "individual indiscreet"),
        ("Iran", "irate tirane"),
        ("Peru", "Peruse"),
        ("Poland", "polarity polish"),
        ("Rome", "Romeo Roman Jerome"),
        ("Warsaw", "wars warship"),
    ],
)
def test_a_word_that_begins_alike_is_another_word(answer: str, words: str) -> None:
    assert as_a_word(answer, words) is None
    assert in_another_form(answer, words) is None


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("Rome", "To rome.", "rome"),
        ("New York", "He left New\nYork.", "New\nYork"),
        ("C++", "Written in C++ then.", "C++"),
        ("48213", "148213 or 482130", None),
        ("Rome", "Rome's gates", "Rome"),
        ("東京", "彼は東京に住む。", "東京"),
        ("Rome", "他住在Rome的城里", "Rome"),
        ("서울", "그는 서울에 산다", "서울"),
    ],
)
def test_a_word_ends_where_its_script_ends_words(answer: str, text: str, found: str | None) -> None:
    assert as_a_word(answer, text) == found


def test_a_needle_says_an_answer_only_as_a_word_of_its_own() -> None:
    fact = Fact("x", "Jerome lives near the Colosseum.", "Near which city?", "Rome")
    assert not fact.literal
    assert fact._replace(needle="Laura lives in ROME.").literal
