"""Folders of results as they are read: one writer's config with that writer's numbers, all of one shape."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from locos_fast.scoring import result_folder
from locos_fast.scoring.head_scores import ARRAYS, HeadScores
from locos_fast.scoring.passages import Passage, PassageAttribution

NAN = float("nan")


def scores(value: float = 1.0, shape: tuple[int, ...] = (2, 3)) -> HeadScores:
    return HeadScores(**{name: np.full(shape, value) for name in ARRAYS}, meta={"value": value})


# --- several at once


@pytest.fixture(params=["locks", "no locks"])
def locks(request, monkeypatch):
    if request.param == "no locks":  # Windows, some network file systems
        monkeypatch.setattr(result_folder, "fcntl", None)
    return request.param == "locks"


def test_a_reader_never_takes_one_writers_config_for_the_others_numbers(tmp_path: Path, locks: bool) -> None:
    writers_done, failures = threading.Event(), []
    scores(0.0).save_pretrained(tmp_path)

    def write(value: float) -> None:
        try:
            for _ in range(60):
                scores(value).save_pretrained(tmp_path, overwrite=True)
        except Exception as error:
            failures.append(error)

    def read() -> None:
        while not writers_done.is_set():
            try:
                found = HeadScores.from_pretrained(tmp_path)
            except (FileNotFoundError, ValueError) as error:  # said clearly where there are no locks
                if locks or str(tmp_path) not in str(error):
                    failures.append(error)
            else:
                if found.score[0, 0] != found.meta["value"]:
                    failures.append(AssertionError(f"{found.score[0, 0]} with {found.meta}"))

    writers = [threading.Thread(target=write, args=(value,)) for value in (1.0, 2.0)] if locks else []
    writers = writers or [threading.Thread(target=write, args=(1.0,))]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    writers_done.set()
    reader.join()
    assert failures == []
    final = HeadScores.from_pretrained(tmp_path)
    assert final.score[0, 0] == final.meta["value"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "scores.safetensors"]


def test_another_results_numbers_are_refused(tmp_path: Path) -> None:
    scores(1.0).save_pretrained(tmp_path / "a")
    scores(2.0).save_pretrained(tmp_path / "b")
    (tmp_path / "a" / "scores.safetensors").replace(tmp_path / "b" / "scores.safetensors")
    with pytest.raises(ValueError, match=r"its scores\.safetensors is not the one that its config\.json describes"):
        HeadScores.from_pretrained(tmp_path / "b")


def test_a_config_that_goes_while_it_is_looked_at_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer takes it away before it puts its own there."""
    scores().save_pretrained(tmp_path)
    read = Path.read_bytes

    def gone(path: Path) -> bytes:
        path.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", gone)
    scores().save_pretrained(tmp_path, overwrite=True)


@pytest.mark.parametrize("hashes", [3, [], {}, {"scores.safetensors": 1}])
def test_hashes_that_are_none_are_refused(tmp_path: Path, hashes: Any) -> None:
    scores().save_pretrained(tmp_path)
    change(tmp_path, files_sha256=hashes)
    with pytest.raises(ValueError, match="is not the one that its config"):
        HeadScores.from_pretrained(tmp_path)


def test_a_folder_without_hashes_is_read(tmp_path: Path) -> None:
    scores(3.0).save_pretrained(tmp_path)
    change(tmp_path, files_sha256=None)
    assert HeadScores.from_pretrained(tmp_path).score[0, 0] == 3.0


def test_meta_cannot_pass_for_the_schema_version(tmp_path: Path) -> None:
    mislabelled = scores()
    mislabelled.meta["schema_version"] = 99
    mislabelled.save_pretrained(tmp_path)
    assert HeadScores.from_pretrained(tmp_path).meta == {"value": 1.0}


def change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# --- arrays that are not what they should be


def write_arrays(folder: Path, **changes: torch.Tensor) -> None:
    scores().save_pretrained(folder)
    save_file({name: torch.ones(2, 3) for name in ARRAYS} | changes, folder / "scores.safetensors")
    change(folder, files_sha256=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"dla": torch.ones(2, 4)},
        {"dla": torch.ones(6)},
        {"score": torch.ones(2, 3, 1)},
        {"wu": torch.ones(2, 3, dtype=torch.bool)},
        {"l_plus": torch.ones(2, 3, dtype=torch.bfloat16)},
        {"l_plus": torch.ones(2, 3).to(torch.float8_e4m3fn)},
        {"per_trial": torch.ones(2, 3)},
        {"per_trial": torch.ones(5, 3, 2)},
        {"per_trial": torch.ones(())},
    ],
    ids=lambda changes: "-".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in changes.items()),
)
def test_arrays_of_another_shape_or_type_are_refused_with_the_folder(tmp_path: Path, changes: Any) -> None:
    write_arrays(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^{tmp_path} is not a score folder: "):
        HeadScores.from_pretrained(tmp_path)


def test_half_precision_and_more_trials_are_read(tmp_path: Path) -> None:
    write_arrays(tmp_path, dla=torch.ones(2, 3).half(), per_trial=torch.ones(7, 2, 3))
    read = HeadScores.from_pretrained(tmp_path)
    assert (read.dla.dtype, read.per_trial.shape) == (np.float64, (7, 2, 3))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema_version": ' + "[" * 100_000, '"\udcff"', "1" * 5000])
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    scores().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="is not a score folder"):
        HeadScores.from_pretrained(tmp_path)


@pytest.mark.parametrize("array", [None, [[1.0, 2.0]], np.ones(3), np.ones((2, 2)), np.ones((2, 3), dtype=complex)])
def test_arrays_that_do_not_fit_are_named(array: Any) -> None:
    with pytest.raises(ValueError, match=r"^wu: expected an array of real numbers, "):
        HeadScores(**({name: np.ones((2, 3)) for name in ARRAYS} | {"wu": array}))


def passages(logits: Any = None) -> PassageAttribution:
    logits = np.ones((2, 3, 2), dtype=np.float32) if logits is None else logits
    return PassageAttribution(logits, [Passage(0, 4, "One."), Passage(4, 9, "Two.")], {"model": "tiny"})


@pytest.mark.parametrize("logits", [[1.0], np.ones((2, 3)), np.ones((2, 3, 3)), np.ones((2, 3, 2), dtype=int)])
def test_an_attribution_of_another_shape_is_refused(logits: Any) -> None:
    with pytest.raises(ValueError, match=r"^logits: expected real numbers, \(layers, heads, 2\), got"):
        passages(logits)


@pytest.mark.parametrize(
    "line", ["3", "[1, 2]", '{"start": 0}', '{"start": "0", "end": 4, "text": "One."}', "[" * 100_000, "{"]
)
def test_passages_that_are_none_are_refused(tmp_path: Path, line: str) -> None:
    passages().save_pretrained(tmp_path)
    (tmp_path / "passages.jsonl").write_text(f"{line}\n" * 2)
    change(tmp_path, files_sha256=None)
    with pytest.raises(ValueError, match="is not an attribution folder"):
        PassageAttribution.from_pretrained(tmp_path)


def test_an_attribution_survives_the_round_trip_and_no_mixture(tmp_path: Path) -> None:
    passages().save_pretrained(tmp_path)
    again = PassageAttribution.from_pretrained(tmp_path)
    assert (again.passages, again.meta) == (passages().passages, passages().meta)
    np.testing.assert_array_equal(again.logits, passages().logits)
    (tmp_path / "passages.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"its passages\.jsonl is not the one that its config\.json describes"):
        PassageAttribution.from_pretrained(tmp_path)


# --- rankings


@pytest.mark.parametrize("k", [-1, 1.5, "3", None])
def test_a_number_of_heads_that_is_none_is_refused(k: Any) -> None:
    for rank in (scores().top, passages().top_passages, passages().top_pairs):
        with pytest.raises(ValueError, match=r"^k: expected a whole number, 0 or more, got"):
            rank(k)
    assert scores().top(0) == passages().top_passages(0) == passages().top_pairs(0) == []


@pytest.mark.parametrize("share", [0, -1, 1.01, NAN, True, "0.1", None])
def test_a_share_that_is_none_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match=r"^share: expected a share of the largest value"):
        scores().found(share)


def test_the_mean_takes_any_iterable_of_scores() -> None:
    mean = HeadScores.mean(scores(value) for value in (1.0, 2.0, 6.0))
    assert mean.score[1, 2] == 3.0
    assert mean.per_trial.shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("given", "got"),
    [([], "none"), ([scores(), None], "NoneType"), ([scores(), scores(shape=(2, 4))], r"\[\(2, 3\), \(2, 4\)\]")],
)
def test_a_mean_of_anything_else_is_refused(given: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^scores: expected .*, got {got}"):
        HeadScores.mean(given)
