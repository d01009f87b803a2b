"""Data sets by name."""

from __future__ import annotations

import json

import pytest

from locos_fast.prompts.datasets import DATASET_NAMES, read_dataset
from locos_fast.prompts.datasets import published as registry
from tests.oracles.published_data import write_niah, write_nolima


def test_without_a_folder_published_sets_are_read_where_data_get_puts_them(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(registry.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match=r"niah: .*locos_fast/datasets/niah has no needles.jsonl"):
        read_dataset("niah")
    write_niah(tmp_path / "locos_fast/datasets/niah")
    write_nolima(tmp_path / "locos_fast/datasets/nolima")
    assert [read_dataset(name).name for name in ("niah", "nolima", "nolima-hard")] == ["niah", "nolima", "nolima-hard"]


def test_a_file_of_ones_own_is_named_by_its_stem_and_not_curated(tmp_path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"needle": "a b.", "question": "c?", "answer": "b"}))
    data = read_dataset(str(file))
    assert (data.name, data.curated, [f.id for f in data.facts]) == ("mine", False, ["mine-1"])


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("squad", {}, "dataset: expected numbers, bridges, niah, nolima, nolima-hard, planted or a .jsonl file"),
        ("squad:folder", {}, "dataset: expected numbers"),
        ("numbers:folder", {}, "dataset: expected numbers"),
        ("niah:", {}, "dataset: expected a folder behind the colon, got 'niah:'"),
        ("numbers", {"question_type": "onehop"}, "question-type: only nolima and nolima-hard have them, not 'numbers'"),
        ("niah", {"characters": 2}, "characters: only nolima"),
        ("nolima", {"characters": 0}, "characters: expected at least 1, got 0"),
        ("planted", {}, "planted.trials.planted_trials"),
    ],
)
def test_what_is_no_data_set_is_refused(dataset: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_dataset(dataset, **options)


def test_every_name_is_read_or_says_what_it_lacks(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(registry.platformdirs, "user_cache_path", lambda name: tmp_path)
    for name in DATASET_NAMES:
        try:
            assert read_dataset(name).facts
        except ValueError as error:
            assert name.partition("-")[0] in str(error)
