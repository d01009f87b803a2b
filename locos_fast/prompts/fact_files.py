"""Needles of your own: a file with one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from locos_fast.prompts.needle_prompt import Fact

REQUIRED, OPTIONAL = ("needle", "question", "answer"), ("lead", "group")


def read_facts(path: Path) -> list[Fact]:
    """The facts of a .jsonl file with the fields needle, question, answer and, if wanted, lead and group.

    Raises ValueError naming file, line and field for a line that is none, and for a file without any.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"dataset: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    facts = [_fact(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not facts:
        raise ValueError(f"dataset: {path} holds no needles")
    return [fact._replace(id=f"{path.stem}-{number}") for number, fact in enumerate(facts, 1)]


def _fact(line: str, place: str) -> Fact:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"dataset: {place}: no JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ValueError(f"dataset: {place}: expected an object with {', '.join(REQUIRED)}, got {line.strip()[:40]!r}")
    if unknown := [name for name in entry if name not in (*REQUIRED, *OPTIONAL)]:
        raise ValueError(
            f"dataset: {place}: unknown field {unknown[0]!r}; there are {', '.join((*REQUIRED, *OPTIONAL))}"
        )
    fields = {name: _text(entry, name, place) for name in REQUIRED}
    fields |= {name: _text(entry, name, place) for name in OPTIONAL if name in entry}
    return Fact(id="", **fields)


def _text(entry: dict[str, Any], name: str, place: str) -> str:
    if name not in entry:
        raise ValueError(f"dataset: {place}: field {name!r} is missing")
    value = entry[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"dataset: {place}: field {name!r}: expected text, got {json.dumps(value)[:40]}")
    return value.strip()
