"""Small folders in the layouts in which others publish their data sets; needles and texts are of our own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = "the old town had many bridges over a quiet river and people walked there in summer".split()
NIAH_NEEDLES = [
    {
        "needle": "The best way to see the harbour is to climb the lighthouse at noon.",
        "question": "What is the best way to see the harbour ?",
        "real_needle": "climb the lighthouse at noon.",
    },
    {
        "needle": "The bakery is closed on Mondays as its oven has to cool down.",
        "question": "Why is the bakery closed on Mondays ?",
        "real_needle": "As its oven has to cool down.",
    },
    {
        "needle": "A clerk found that both ledgers, the red and the green one, had been filled in twice.",
        "question": "What did a clerk find ?",
        "real_needle": "both ledgers (the red and the green one) were filled in twice.",
    },
]
CHARACTERS = ["Yara", "Otto", "Mina", "Karl"]
TASK = "Here is a part of a book:\n\n{haystack}\n\nUse it to answer.\n\nQuestion: {question}\n\n Give the name only."
NOLIMA_ENTRIES: list[dict[str, Any]] = [
    {
        "id": "0101",
        "reasoning_type": "world_knowledge",
        "system_prompt": "",
        "task_template": TASK,
        "needle": "{CHAR} rents a room beside {1}.",
        "questions": {"onehop": "Who rents a room in {2}?", "twohop": "Who rents a room in {3}?"},
        "character_set": CHARACTERS,
        "tests": {
            "T01": {"input_args": ["the Atomium", "Brussels", "Belgium"]},
            "T02": {"input_args": ["the Alhambra", "Granada", "Spain"]},
            "T03": {"input_args": ["the Rialto", "Venice", "Italy"]},
        },
    },
    {
        "id": "0102",
        "task_template": TASK,
        "needle": "Since spring {CHAR} has eaten no {1}.",
        "questions": {"onehop": "Who would not order {2}?"},
        "character_set": CHARACTERS,
        "tests": {"T01": {"input_args": ["fish", "a trout"]}, "T02": {"input_args": ["meat", "a steak"]}},
    },
    {
        "id": "0103",
        "task_template": TASK,
        "needle": "Below the stairs {CHAR} keeps a {1}.",
        "questions": {"onehop": "Who could {2}?"},
        "character_set": CHARACTERS,
        "tests": {"T01": {"input_args": ["cello", "play in a quartet"]}},
    },
]


def texts_in(entries: Any) -> list[str]:
    """All texts in lists and objects."""
    if isinstance(entries, str):
        return [entries]
    return [text for entry in (entries.values() if isinstance(entries, dict) else entries) for text in texts_in(entry)]


def prose(sentences: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"{' '.join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize()}." for _ in range(sentences))


def write_niah(folder: Path, needles: list[dict[str, Any]] | None = None) -> Path:
    """Part 1 is plain text, the others are rows of the hub's viewer; each is short."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = NIAH_NEEDLES if needles is None else needles
    (folder / "needles.jsonl").write_text("\n".join(map(json.dumps, chosen)) + "\n", encoding="utf-8")
    for number in range(1, len(chosen) + 1):
        part = folder / f"part{number}"
        part.mkdir(exist_ok=True)
        texts = [prose(6, seed=10 * number + row) for row in range(3)]
        if number == 1:
            (part / "p1.plain.txt").write_text("\n\n".join(texts), encoding="utf-8")
        rows = [{"row_idx": i, "row": {"text": text}, "truncated_cells": []} for i, text in enumerate([*texts, ""])]
        (part / "p1.txt").write_text(json.dumps({"features": [], "rows": rows}), encoding="utf-8")
    return folder


def write_nolima(folder: Path, entries: Any = None, *, books: int = 2, flat: bool = False) -> Path:
    """The folders of the hub, or flat: needle sets and books directly in `folder` and `haystack`."""
    needles, texts = (
        (folder, folder / "haystack") if flat else (folder / "needlesets", folder / "haystack/rand_shuffle")
    )
    for place in (needles, texts):
        place.mkdir(parents=True, exist_ok=True)
    chosen = NOLIMA_ENTRIES if entries is None else entries
    (needles / "needle_set.json").write_text(json.dumps(chosen), encoding="utf-8")
    (needles / "needle_set_hard.json").write_text(json.dumps(NOLIMA_ENTRIES[:1]), encoding="utf-8")
    for number in range(1, books + 1):
        (texts / f"rand_book_{number}.txt").write_text(f"Book {number}. {prose(200, number)}", encoding="utf-8")
    return folder
