"""NoLiMa (arXiv 2502.05167): questions that share no word with the needle, read from the folder that is published."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from locos_fast.prompts.datasets.dataset import Dataset, taking_turns
from locos_fast.prompts.datasets.published import NOLIMA
from locos_fast.prompts.json_entries import field, json_value, read_file
from locos_fast.prompts.needle_prompt import Fact, cut_template

QUESTION_TYPES = ("onehop", "twohop", "twohop2")
NEEDLE_SETS = {"nolima": "needle_set.json", "nolima-hard": "needle_set_hard.json"}
TEXT_FOLDERS = ("haystack/rand_shuffle", "haystack")
SLOT = re.compile(r"\{(CHAR|\d+)\}")


def read_nolima(
    folder: Path, *, name: str = "nolima", question_type: str = "onehop", characters: int = 1, seed: int = 0
) -> Dataset:
    """Every test of every entry that has that type of question, asked of some of its characters; entry i is hidden in
    book i modulo their number.

    name: nolima or nolima-hard. characters: how many of each test's, drawn with the seed; all if it has no more.
    The entries take turns. A fact's foil is another character.
    Raises ValueError for a file that is missing, saying how to get it, an unknown question type or one that no entry
    has, and, naming file, entry and field, for an entry that is none.
    """
    if question_type not in QUESTION_TYPES:
        raise ValueError(f"question-type: expected {' or '.join(QUESTION_TYPES)}, got {question_type!r}")
    if characters < 1:
        raise ValueError(f"characters: expected at least 1, got {characters}")
    path = _needle_set(folder, NEEDLE_SETS[name])
    entries = json_value(read_file(path), str(path))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"dataset: {path}: expected a list of entries, got {json.dumps(entries)[:40]}")
    texts = _texts(folder)
    books = list(texts)
    columns = []
    for number, entry in enumerate(entries):
        place = f"{path}, entry {number + 1}"
        if not isinstance(entry, dict):
            raise ValueError(f"dataset: {place}: expected an object, got {json.dumps(entry)[:40]}")
        if question_type in field(entry, "questions", place, dict):
            columns.append(_facts(entry, place, question_type, books[number % len(books)], characters, seed))
    if not columns:
        raise ValueError(f"question-type: no entry of {path} has a question of type {question_type}")
    options = {"question_type": question_type, "characters": characters}
    return Dataset(name, taking_turns(columns), texts, said=True, options=options)


def _facts(entry: dict[str, Any], place: str, question_type: str, book: str, count: int, seed: int) -> list[Fact]:
    identity, needle = field(entry, "id", place), field(entry, "needle", place)
    question = field(entry["questions"], question_type, f"{place}, questions")
    names = field(entry, "character_set", place, list)
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"dataset: {place}: field 'character_set': expected names, got {json.dumps(names)[:40]}")
    template = field(entry, "task_template", place)
    try:
        cut_template(template)
    except ValueError as error:
        raise ValueError(f"dataset: {place}: field 'task_template': {error}") from None
    facts = []
    for test, given in field(entry, "tests", place, dict).items():
        where = f"{place}, test {test}"
        if not isinstance(given, dict):
            raise ValueError(f"dataset: {where}: expected an object, got {json.dumps(given)[:40]}")
        arguments = field(given, "input_args", where, list)
        drawn = random.Random(f"{seed}/{identity}/{test}").sample(names, len(names))
        for character in drawn[:count]:
            facts.append(
                Fact(
                    id=f"{identity}-{test}-{character}",
                    needle=_filled(needle, character, arguments, f"{where}, field 'needle'"),
                    question=_filled(question, character, arguments, f"{where}, field {question_type!r}"),
                    answer=character,
                    group=identity,
                    about=character,
                    template=template,
                    haystack=book,
                    foil=next((name for name in reversed(drawn) if name != character), ""),
                )
            )
    return facts


def _filled(text: str, character: str, arguments: list[Any], place: str) -> str:
    """The text with {CHAR} and {1}, {2}, ... filled in."""

    def value(slot: re.Match[str]) -> str:
        if slot[1] == "CHAR":
            return character
        if not 1 <= int(slot[1]) <= len(arguments):
            raise ValueError(f"dataset: {place}: {slot[0]} is none of its {len(arguments)} input_args")
        return str(arguments[int(slot[1]) - 1])

    return SLOT.sub(value, text)


def _needle_set(folder: Path, file: str) -> Path:
    found = [path for path in (folder / "needlesets" / file, folder / file) if path.is_file()]
    if not found:
        raise NOLIMA.missing(folder, f"needlesets/{file}")
    return found[0]


def _texts(folder: Path) -> dict[str, str]:
    """The books, by name, in the order of their numbers."""
    for place in TEXT_FOLDERS:
        if files := sorted((folder / place).glob("*.txt"), key=lambda file: (len(file.name), file.name)):
            texts = {file.stem: read_file(file) for file in files}
            if empty := [name for name, text in texts.items() if not text.strip()]:
                raise ValueError(f"dataset: {folder / place / empty[0]}.txt holds no text")
            return texts
    raise NOLIMA.missing(folder, "haystack/rand_shuffle/rand_book_*.txt")
