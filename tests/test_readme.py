"""The Python of README.md runs as it stands, on a small model in place of the one it names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from locos_fast.planted import build
from locos_fast.scoring.head_scores import HeadScores
from tests.detector_table import table

README = Path(__file__).resolve().parents[1] / "README.md"
MODEL = '"smollm2"'


def python_of_readme() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    return "\n".join(blocks)


def run(code: str) -> dict:
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    return names


def check(names: dict, folder: Path) -> None:
    """What its comments say of the results."""
    scores, trial, one = names["scores"], names["trial"], names["one"]
    layers, heads = scores.score.shape
    assert scores.per_trial.shape == (3, layers, heads)
    np.testing.assert_array_equal(HeadScores.from_pretrained(folder / "scores").score, np.float32(scores.score))
    np.testing.assert_array_equal(scores.per_trial[1], one.score)
    tokens = names["tokenizer"].decode(trial.prompt_ids[slice(*trial.needle_span)])
    assert "key" in tokens or "UNK" in tokens
    assert 45 < trial.depth <= 50
    assert names["written"].shape == (layers, heads, 3)
    # float32 sums over the same keys in another order
    scale = np.nanmax(np.abs(one.dla))
    np.testing.assert_allclose(names["written"].sum(-1), one.dla, atol=1e-4 * scale)
    assert names["sums"].span.shape == (1, 8, 2, 2)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(seed=0).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code = python_of_readme()
    assert code.count(f"load({MODEL})") == 1
    check(run(code.replace(MODEL, repr(str(tmp_path / "model")))), tmp_path)


@pytest.mark.real
@pytest.mark.slow
def test_it_runs_word_for_word_on_the_model_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(run(python_of_readme()), tmp_path)


def test_the_table_of_detectors_is_their_registry() -> None:
    assert f"\n{table()}\n" in README.read_text(encoding="utf-8")
