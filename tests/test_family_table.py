"""The README's table of model families is what running them gives."""

from __future__ import annotations

from pathlib import Path

from tests.family_table import markdown
from tests.oracles.further_families import EXACT, REFUSED, known

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_holds_the_table_of_families():
    text, table = README.read_text(encoding="utf-8"), markdown()
    if known(EXACT | REFUSED) == [*EXACT, *REFUSED]:
        assert f"\n\n{table}\n\n" in text, "paste what python -m tests.family_table prints"
    else:  # an older transformers, without some of the classes
        assert [row for row in table.splitlines() if row not in text.splitlines()] == []
    verdicts = [row.split(" | ")[-1] for row in table.splitlines()[2:]]
    assert all(verdict.startswith(("exact", "refused: ", "published score only: ")) for verdict in verdicts)
