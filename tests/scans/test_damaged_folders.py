"""A scan's folder that something happened to: said, and what is lost is run again."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from locos_fast.scans import store
from locos_fast.scans.merge import merge
from locos_fast.scans.run import scan
from locos_fast.scans.store import ScanFolder


def missing(folder: Path) -> None:
    next((folder / "arrays").iterdir()).unlink()


def truncated(folder: Path) -> None:
    file = next((folder / "arrays").iterdir())
    file.write_bytes(file.read_bytes()[:-10])


def empty(folder: Path) -> None:
    next((folder / "arrays").iterdir()).write_bytes(b"")


def of_another_scan(folder: Path) -> None:
    store.save_file({"other/score": store.np.zeros((2, 2))}, next((folder / "arrays").iterdir()))


def without_names(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    for line in lines:
        del line["arrays"], line["names"]
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("damage", [missing, truncated, empty, of_another_scan, without_names])
def test_trials_whose_scores_are_lost_are_said_and_run_again(model, trials, tmp_path: Path, damage) -> None:
    scan(model.model, model.tokenizer, trials, tmp_path / "x")
    before = (tmp_path / "x" / "scores.safetensors").read_bytes()
    damage(tmp_path / "x")
    with pytest.raises(ValueError, match=r"merge: in all parts together no trial counts \(8 open\)"):
        merge([tmp_path / "x"], tmp_path / "y")
    said: list[str] = []
    found = scan(model.model, model.tokenizer, trials, tmp_path / "x", resume=True, notice=said.append)
    assert found.statuses == {"scored": 8}
    assert len(said) == 1 and "the scores of 8 trials cannot be read" in said[0] and str(tmp_path / "x") in said[0]
    assert (tmp_path / "x" / "scores.safetensors").read_bytes() == before
    scan(model.model, model.tokenizer, trials, tmp_path / "x", resume=True, notice=said.append)
    assert len(said) == 1  # nothing is lost any more


@pytest.mark.parametrize("name", ["extra.safetensors", "1b.safetensors"])
def test_files_of_others_among_the_arrays_are_left_alone(model, trials, tmp_path: Path, name: str) -> None:
    scan(model.model, model.tokenizer, trials[:4], tmp_path)
    (tmp_path / "arrays" / name).write_bytes(b"mine")
    assert scan(model.model, model.tokenizer, trials, tmp_path, resume=True).statuses == {"scored": 8}
    assert (tmp_path / "arrays" / name).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"schema_version": 1}, "its manifest.json has no config"),
        ({"schema_version": 1, "config": {}}, "its manifest.json has no trials"),
        ({"schema_version": 1, "config": {}, "trials": []}, "its manifest.json has no trials"),
        ({"schema_version": 1, "config": {}, "trials": [{"id": "a"}]}, "trial 1 of its manifest.json has no key"),
        ({"schema_version": 1, "config": {}, "trials": ["a"]}, "trial 1 of its manifest.json has no key"),
        ([], "expected a scan of schema version 1, got None"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, manifest: object, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        ScanFolder(tmp_path).read_manifest()


@pytest.mark.skipif(store.fcntl is None, reason="no locks here")
def test_a_file_system_without_locks_is_worked_on_all_the_same(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store.fcntl, "flock", refuse)
    with ScanFolder(tmp_path).locked():
        pass
    monkeypatch.setattr(store.fcntl, "flock", lambda *_: (_ for _ in ()).throw(BlockingIOError(errno.EAGAIN, "taken")))
    with pytest.raises(FileExistsError, match="another process"), ScanFolder(tmp_path).locked():
        pass
