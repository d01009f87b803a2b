"""Entries of data sets in JSON: read, or refused with the file, the place in it and the field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


def json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file with one JSON object a line, empty lines passed over, each with file and line in words.

    Raises ValueError, saying these, for a file that cannot be read and a line that is no object.
    """
    for number, line in enumerate(read_file(path).split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield json_object(line, place), place


def read_file(path: Path) -> str:
    """The text of a UTF-8 file of a data set. Raises ValueError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"dataset: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def json_value(text: str, place: str) -> Any:
    """A JSON value. Raises ValueError, saying where it stands, for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"dataset: {place}: no JSON ({error})") from error


def json_object(text: str, place: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError, saying where it stands, for what is none."""
    entry = json_value(text, place)
    if not isinstance(entry, dict):
        raise ValueError(f"dataset: {place}: expected an object, got {text.strip()[:40]!r}")
    return entry


def field(entry: dict[str, Any], name: str, place: str, kind: type = str) -> Any:
    """A field of an entry: text without the white space around it, or a list or an object with something in it.

    Raises ValueError, naming the place and the field, if it is missing, of another kind or empty.
    """
    if name not in entry:
        raise ValueError(f"dataset: {place}: field {name!r} is missing")
    value = entry[name].strip() if isinstance(entry[name], str) else entry[name]
    if not isinstance(value, kind) or not value:
        raise ValueError(
            f"dataset: {place}: field {name!r}: expected {KINDS[kind]}, got {json.dumps(entry[name])[:40]}"
        )
    return value
