"""The needle test of Wu et al. (arXiv 2404.15574), as their repository publishes it in `haystack_for_detect`."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from locos_fast.prompts.datasets.dataset import Dataset
from locos_fast.prompts.datasets.published import NIAH
from locos_fast.prompts.json_entries import field, json_lines, json_value, read_file
from locos_fast.prompts.needle_prompt import CONTEXT, QUESTION, Fact

TEMPLATE = f"{CONTEXT}Based on the content of the book, Question: {QUESTION}\nAnswer:"
SHARE_FOUND = 0.5  # of the words of a copied span: with fewer in the needle it is no part of it


def read_niah(folder: Path) -> Dataset:
    """Needle i hidden in the text of part i, which is repeated until it is long enough; the answer, and what is scored,
    is the part of the needle that the file calls real_needle.

    Raises ValueError for a file that is missing, saying how to get it, and, naming file, line and field, for a needle
    that is none.
    """
    path = folder / "needles.jsonl"
    if not path.is_file():
        raise NIAH.missing(folder, path.name)
    facts, texts = [], {}
    for number, (entry, place) in enumerate(json_lines(path), 1):
        part = f"part{number}"
        facts.append(_fact(entry, place, number, part))
        texts[part] = _text(folder, part)
    if not facts:
        raise ValueError(f"dataset: {path} holds no needles")
    return Dataset("niah", facts, texts, repeated=True)


def _fact(entry: dict[str, Any], place: str, number: int, part: str) -> Fact:
    needle, question, copied = (field(entry, name, place) for name in ("needle", "question", "real_needle"))
    span = part_of(needle, copied)
    if span is None:
        raise ValueError(f"dataset: {place}: field 'real_needle': expected a part of the needle, got {copied[:40]!r}")
    return Fact(
        id=f"needle-{number}",
        needle=needle,
        question=question,
        answer=copied,
        group="niah",
        template=TEMPLATE,
        haystack=part,
        evidence=needle[slice(*span)],
    )


def part_of(needle: str, copied: str) -> tuple[int, int] | None:
    """Where in a needle a span stands that was copied from it, in characters: as it is, with other capitals, or
    from the first to the last word that both have in the same order; None if those are fewer than half."""
    if found := re.search(re.escape(copied), needle) or re.search(re.escape(copied), needle, re.IGNORECASE):
        return found.span()
    words = list(re.finditer(r"\w+", needle))
    wanted = [word.casefold() for word in re.findall(r"\w+", copied)]
    matcher = SequenceMatcher(None, [word[0].casefold() for word in words], wanted, autojunk=False)
    blocks = [block for block in matcher.get_matching_blocks() if block.size]
    if not blocks or sum(block.size for block in blocks) < SHARE_FOUND * len(wanted):
        return None
    return words[blocks[0].a].start(), words[blocks[-1].a + blocks[-1].size - 1].end()


def _text(folder: Path, part: str) -> str:
    """The text of a part: plain, or the rows in which the hub's viewer hands out a data set."""
    plain, rows = folder / part / "p1.plain.txt", folder / part / "p1.txt"
    if plain.is_file():
        text = read_file(plain)
    elif rows.is_file():
        text = _text_of_rows(json_value(read_file(rows), str(rows)), rows)
    else:
        raise NIAH.missing(folder, f"{part}/{plain.name} or {part}/{rows.name}")
    if not text.strip():
        raise ValueError(f"dataset: {plain if plain.is_file() else rows} holds no text")
    return text


def _text_of_rows(value: Any, path: Path) -> str:
    try:
        texts = [row["row"].get("text") for row in value["rows"]]
        return "\n\n".join(text for text in texts if text)
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f'dataset: {path}: expected {{"rows": [{{"row": {{"text": ...}}}}, ...]}}') from None
