"""Folders of results: nothing of another kind is written over, and what cannot be written is known beforehand."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from locos_fast.scoring.head_scores import ARRAYS, SCORES, HeadScores
from locos_fast.scoring.result_folder import check_writable


def scores() -> HeadScores:
    return HeadScores(**{name: np.zeros((1, 2)) for name in ARRAYS})


@pytest.mark.parametrize("text", ["5", "null", "[]", '"schema_version"', "{", '{"schema_version": 1}', "[" * 100_000])
def test_a_config_of_something_else_is_never_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FileExistsError, match="not of scores"):
        scores().save_pretrained(tmp_path, overwrite=True)
    assert (tmp_path / "config.json").read_text() == text


def test_a_picture_that_is_there_is_kept_unless_told(tmp_path: Path) -> None:
    (tmp_path / "heads.png").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"heads\.png"):
        SCORES.check(tmp_path, overwrite=False)
    SCORES.check(tmp_path, overwrite=True)


def test_files_get_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        scores().save_pretrained(tmp_path)
    finally:
        os.umask(old)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in SCORES.files} == {0o640}


def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/x", "x" * 300, "dangling", "loop/x"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OSError):
        check_writable(tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
