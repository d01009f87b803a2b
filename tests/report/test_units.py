"""Tables and pictures call logits only what is in the units of a logit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from locos_fast.report.attribution import pairs_table, passages_table, save_picture
from locos_fast.report.pictures import save_heat_map
from locos_fast.report.tables import scores_table
from locos_fast.scoring.head_scores import ARRAYS, HeadScores
from locos_fast.scoring.passages import Passage, PassageAttribution


def scores(norm: str) -> HeadScores:
    return HeadScores(**{name: np.arange(6.0).reshape(2, 3) for name in ARRAYS}, meta={"norm": norm})


@pytest.fixture
def words_drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts of the pictures that are saved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    words: list[str] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **options: object) -> None:
        save(figure, *args, **options)
        words.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", keep)
    return words


@pytest.mark.parametrize(("norm", "unit"), [("none", "dot products with raw unembedding rows"), ("frozen", "logits")])
def test_the_table_of_scores_names_its_unit(norm: str, unit: str) -> None:
    title = str(scores_table(scores(norm), 3).title)
    assert f"({unit}, norm={norm})" in title


@pytest.mark.parametrize(("norm", "unit"), [("none", "dot products with raw unembedding rows"), ("frozen", "logits")])
def test_the_heat_map_names_its_unit(tmp_path: Path, words_drawn: list[str], norm: str, unit: str) -> None:
    save_heat_map(scores(norm), tmp_path / "heads.png", title="title")
    assert unit in words_drawn
    assert norm == "frozen" or not any("logit" in word for word in words_drawn)


def test_an_attribution_is_not_called_logits(tmp_path: Path, words_drawn: list[str]) -> None:
    passages = [Passage(0, 4, "One."), Passage(4, 9, "Two.")]
    result = PassageAttribution(np.ones((2, 3, 2)), passages, {"prompt_tokens": 9, "model": "m", "answer": "a"})
    for table in (passages_table(result, 2), pairs_table(result, 2)):
        said = [str(table.title), *(str(column.header) for column in table.columns)]
        assert not any("logit" in word for word in said)
    save_picture(result, tmp_path / "attribution.png")
    assert "dot products with raw unembedding rows" in words_drawn
    assert not any("logit" in word for word in words_drawn)
