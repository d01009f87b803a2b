"""The README's table of model families is what running them gives."""

from __future__ import annotations

from pathlib import Path

from tests.family_table import markdown

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_holds_the_table_of_families():
    assert f"\n\n{markdown()}\n\n" in README.read_text(encoding="utf-8"), (
        "paste what python -m tests.family_table prints"
    )
