"""A scan of the planted model from the command line: needles of one's own, and a haystack of its filler words."""

from __future__ import annotations

import json
import random
from pathlib import Path

from locos_fast import planted
from locos_fast.planted.vocabulary import CITIES, FILLERS, LANDMARKS, NAMES

MODEL = {"layers": 4, "noise": 0.0005}  # small and quick


def write_planted_scan(folder: Path) -> None:
    """model/, literal.jsonl, bridges.jsonl and haystack.txt."""
    planted.build(**MODEL).save_pretrained(folder / "model")
    literal = [
        {"needle": f"{place} hosts {name} .", "question": f"who {place} ANSWER", "answer": name, "group": "host"}
        for name, place in zip(NAMES, LANDMARKS, strict=True)
    ]
    bridges = [
        {"needle": f"{name} visited {place} .", "question": f"where {name} ANSWER", "answer": city, "group": "city"}
        for name, place, city in zip(NAMES, LANDMARKS, CITIES, strict=True)
    ]
    for name, facts in (("literal", literal), ("bridges", bridges)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, facts)) + "\n", encoding="utf-8")
    rng = random.Random(0)
    sentences = (" ".join(rng.choices(FILLERS, k=rng.randint(5, 11))) + " ." for _ in range(200))
    (folder / "haystack.txt").write_text(" ".join(sentences), encoding="utf-8")


def scan_command(folder: Path, out: Path, **changes: str | None) -> list[str]:
    """`locos-fast scan` of 24 trials in prompts of 60 to 120 tokens; a change to None leaves an option out."""
    options: dict[str, str | None] = {
        "model": str(folder / "model"),
        "dataset": str(folder / "literal.jsonl"),
        "haystack": str(folder / "haystack.txt"),
        "lengths": "60:120:2",
        "depths": "3",
        "limit": "24",
        "device": "cpu",
        "out": str(out),
    } | changes
    return ["scan", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items() if v is not None)]
