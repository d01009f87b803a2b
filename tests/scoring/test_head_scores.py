"""Which heads are found, and how scores survive a round trip through files."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from locos_fast.scoring import head_scores
from locos_fast.scoring.head_scores import ARRAYS, HeadScores

NAN = float("nan")
SCORES = [[0.5, -2.0, NAN], [4.0, 0.4, 1.0]]


def make(score: Any = SCORES, **fields: Any) -> HeadScores:
    """Scores of 2 layers x 3 heads; arrays other than `score` differ from it and from each other."""
    score = np.array(score, dtype=np.float64)
    arrays = {name: score + index for index, name in enumerate(ARRAYS)}
    return HeadScores(**(arrays | fields))


# --- ranking


def test_top_is_in_descending_order_without_nan() -> None:
    assert make().top(3) == [(1, 0), (1, 2), (0, 0)]
    assert make().top(100) == [(1, 0), (1, 2), (0, 0), (1, 1), (0, 1)]
    assert make().top(0) == []


def test_top_keeps_the_order_of_heads_on_ties() -> None:
    assert make([[1.0, 2.0, 1.0], [2.0, 1.0, 2.0]]).top(4) == [(0, 1), (1, 0), (1, 2), (0, 0)]


def test_top_by_another_array() -> None:
    scores = make(dla=np.array([[3.0, 1.0, 2.0], [0.0, NAN, 4.0]]))
    assert scores.top(2, by="dla") == [(1, 2), (0, 0)]
    assert scores.top(2) == make().top(2)


def test_found_heads_have_at_least_a_share_of_the_largest_score() -> None:
    assert make().found() == [(1, 0), (1, 2), (0, 0), (1, 1)]  # 0.4 is exactly a tenth of 4.0
    assert make().found(0.25) == [(1, 0), (1, 2)]
    assert make().found(1.0) == [(1, 0)]


def test_found_by_another_array() -> None:
    assert make(wu=np.array([[0.0, 0.0, 0.0], [0.0, 0.25, 0.01]])).found(by="wu") == [(1, 1)]


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[-1.0, -0.5]], [[NAN, NAN]], [[NAN, -3.0]], [[NAN, 0.0]]])
def test_nothing_is_found_where_nothing_is_positive(values: Any) -> None:
    assert make(values).found() == []


@pytest.mark.parametrize("rank", [lambda scores: scores.top(1, by="mass"), lambda scores: scores.found(by="mass")])
def test_unknown_arrays_are_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"by: expected one of score, .* got 'mass'"):
        rank(make())


# --- mean over trials


def test_the_mean_leaves_out_trials_in_which_a_head_is_nan() -> None:
    trials = [make([[1.0, NAN, NAN]]), make([[3.0, 5.0, NAN]]), make([[5.0, NAN, NAN]])]
    mean = HeadScores.mean(trials, {"trials": 3})
    np.testing.assert_array_equal(mean.score, [[3.0, 5.0, NAN]])
    np.testing.assert_array_equal(mean.wu, [[8.0, 10.0, NAN]])  # `make` adds 5
    np.testing.assert_array_equal(mean.per_trial, np.stack([trial.score for trial in trials]))
    assert mean.meta == {"trials": 3}


def test_the_mean_of_one_trial_is_that_trial() -> None:
    mean = HeadScores.mean([make()])
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(mean, name), getattr(make(), name))
    assert mean.meta == {}


def test_the_mean_of_no_trials_is_refused() -> None:
    with pytest.raises(ValueError, match="scores: expected at least one"):
        HeadScores.mean([])


# --- files

META = {"model": "tiny", "answer_ids": [3, 1], "versions": {"torch": "2.13"}, "needle": "Zürich"}
FILES = ["config.json", "scores.safetensors"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("per_trial", [None, np.array([SCORES, SCORES]) / 3])
def test_scores_survive_a_round_trip_as_float32(tmp_path: Path, per_trial: Any) -> None:
    scores = make(np.array(SCORES) / 3, meta=META, per_trial=per_trial)
    scores.save_pretrained(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == FILES
    again = HeadScores.from_pretrained(tmp_path / "a" / "b")
    for name in ARRAYS:
        assert getattr(again, name).dtype == np.float64
        np.testing.assert_array_equal(getattr(again, name), getattr(scores, name).astype(np.float32))
    assert again.meta == META
    if per_trial is None:
        assert again.per_trial is None
    else:
        np.testing.assert_array_equal(again.per_trial, per_trial.astype(np.float32))
    again.save_pretrained(tmp_path / "again")
    for file in FILES:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "a" / "b" / file).read_bytes()


def test_files_are_readable_without_this_library(tmp_path: Path) -> None:
    """Plain JSON and safetensors: nothing that runs code when it is loaded."""
    make(meta=META).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    hashes = {"scores.safetensors": hashlib.sha256((tmp_path / "scores.safetensors").read_bytes()).hexdigest()}
    assert config == {"schema_version": head_scores.SCORES.version, **META, "files_sha256": hashes}
    arrays = load_file(tmp_path / "scores.safetensors")
    assert sorted(arrays) == sorted(ARRAYS)
    assert {(array.shape, str(array.dtype)) for array in arrays.values()} == {((2, 3), "float32")}


def test_arrays_in_any_memory_order_are_written_as_they_read(tmp_path: Path) -> None:
    """safetensors stores the memory of an array, whatever its strides."""
    turned = np.asfortranarray(np.array(SCORES))
    make(dla=turned, wu=np.array(SCORES).T.copy().T).save_pretrained(tmp_path)
    again = HeadScores.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.dla, turned.astype(np.float32))
    np.testing.assert_array_equal(again.wu, turned.astype(np.float32))


def test_an_empty_folder_and_other_files_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text("{}\n")
    make().save_pretrained(tmp_path)
    assert names(tmp_path) == [*FILES, "trials.jsonl"]


@pytest.mark.parametrize("content", ['{"schema_version": 0}', None])
def test_a_folder_that_holds_scores_is_not_overwritten(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "scores.safetensors").write_text("precious")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileExistsError, match="already holds scores"):
        make().save_pretrained(tmp_path)
    assert (tmp_path / "scores.safetensors").read_text() == "precious"
    assert (tmp_path / "config.json").exists() == (content is not None)
    make(meta=META).save_pretrained(tmp_path, overwrite=True)
    assert HeadScores.from_pretrained(tmp_path).meta == META
    assert names(tmp_path) == FILES


@pytest.mark.parametrize("config", ['{"model_type": "llama"}', "not JSON"])
def test_a_config_that_is_not_of_scores_is_never_replaced(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"holds a config\.json that is not of scores"):
            make().save_pretrained(tmp_path, overwrite=overwrite)
    assert (tmp_path / "config.json").read_text() == config


def test_a_file_in_place_of_the_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is a file, not a folder"):
            make().save_pretrained(tmp_path / "scores", overwrite=overwrite)
    assert (tmp_path / "scores").read_text() == "precious"


class DiskFull(OSError):
    pass


def disk_full(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise DiskFull


def test_a_write_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(DiskFull):
        make().save_pretrained(tmp_path)
    assert names(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_scores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make(meta=META).save_pretrained(tmp_path)
    before = [(tmp_path / file).read_bytes() for file in FILES]
    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(DiskFull):
        make(meta={"model": "another"}).save_pretrained(tmp_path, overwrite=True)
    assert names(tmp_path) == FILES
    assert [(tmp_path / file).read_bytes() for file in FILES] == before


@pytest.mark.parametrize("value", [NAN, {1, 2}, np.float32(1.0)])
def test_meta_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        make(meta={"value": value}).save_pretrained(tmp_path / "scores")
    assert names(tmp_path) == []


# --- folders that hold no scores


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a score folder: it has no config\.json"):
        HeadScores.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"is not a score folder: it has no {missing}"):
        HeadScores.from_pretrained(tmp_path)


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("version", [None, 0, head_scores.SCORES.version + 1, "1"])
def test_another_schema_version_is_refused(tmp_path: Path, version: Any) -> None:
    make().save_pretrained(tmp_path)
    rewrite(tmp_path, schema_version=version)
    with pytest.raises(ValueError, match=f"expected schema version {head_scores.SCORES.version}, got {version}"):
        HeadScores.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        HeadScores.from_pretrained(tmp_path)


def test_a_missing_array_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = head_scores.tensor_bytes
    monkeypatch.setattr(head_scores, "tensor_bytes", lambda arrays: save({"score": arrays["score"]}))
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its scores have no l_plus, l_minus"):
        HeadScores.from_pretrained(tmp_path)


def test_scores_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    """Above all a pickle, which would run code."""
    make().save_pretrained(tmp_path)
    (tmp_path / "scores.safetensors").write_bytes(b"\x80\x04]\x94.")
    with pytest.raises(ValueError, match="is not a score folder"):
        HeadScores.from_pretrained(tmp_path)
