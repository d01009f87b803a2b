"""Needles of your own: a file with one JSON object a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from locos_fast.prompts.json_entries import field, json_lines
from locos_fast.prompts.needle_prompt import Fact

REQUIRED, OPTIONAL = ("needle", "question", "answer"), ("lead", "group")


def read_facts(path: Path) -> list[Fact]:
    """The facts of a .jsonl file with the fields needle, question, answer and, if wanted, lead and group.

    Raises ValueError naming file, line and field for a line that is none, and for a file without any.
    """
    facts = [_fact(entry, place) for entry, place in json_lines(path)]
    if not facts:
        raise ValueError(f"dataset: {path} holds no needles")
    return [fact._replace(id=f"{path.stem}-{number}") for number, fact in enumerate(facts, 1)]


def _fact(entry: dict[str, Any], place: str) -> Fact:
    if unknown := [name for name in entry if name not in (*REQUIRED, *OPTIONAL)]:
        raise ValueError(
            f"dataset: {place}: unknown field {unknown[0]!r}; there are {', '.join((*REQUIRED, *OPTIONAL))}"
        )
    fields = {name: field(entry, name, place) for name in REQUIRED}
    fields |= {name: field(entry, name, place) for name in OPTIONAL if name in entry}
    return Fact(id="", **fields)
