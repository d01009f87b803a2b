"""The README's table of model families is what running them gives."""

from __future__ import annotations

import re
from pathlib import Path

from tests.family_table import markdown
from tests.oracles.further_families import EXACT, REFUSED, known

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_holds_the_table_of_families():
    text, table = README.read_text(encoding="utf-8"), markdown()
    if known(EXACT | REFUSED) == [*EXACT, *REFUSED]:
        assert f"\n\n{table}\n\n" in text, "paste what python -m tests.family_table prints"
    else:  # an older transformers, without some of the classes and names of layers
        assert set(map(verdict, table.splitlines())) <= set(map(verdict, text.splitlines()))
    assert {verdict(row)[1] for row in table.splitlines()[2:]} == {"exact", "refused", "published score only"}


def verdict(row: str) -> tuple[str, str]:
    """The model class of a row, and how exactly it is scored, without the reason."""
    return row.split(" | ")[0], re.split("[:;|]", row.split(" | ")[-1])[0].strip()
