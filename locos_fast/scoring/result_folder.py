"""Folders of results: told from other folders, never written over by accident, complete or without a config.json."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

CONFIG = "config.json"


class ResultKind(NamedTuple):
    """What a folder of results holds."""

    what: str  # "scores"
    schema: str  # the key of config.json that marks it
    version: int
    files: tuple[str, ...]  # config.json last: with it a folder is complete
    picture: str  # what the command line draws beside them

    def check(self, folder: Path, *, overwrite: bool) -> None:
        """Raises FileExistsError for a file, for a folder with anything else's config.json, and, unless `overwrite`,
        for one with a file that would be replaced."""
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file, not a folder")
        if (folder / CONFIG).exists() and not self._marks(folder):
            raise FileExistsError(f"{folder} holds a config.json that is not of {self.what}; choose another folder")
        if overwrite:
            return
        if taken := [name for name in (*self.files, self.picture) if os.path.lexists(folder / name)]:
            raise FileExistsError(
                f"{folder} already holds {self.what} ({', '.join(taken)}); choose another folder or overwrite them"
            )

    def write(self, folder: Path, content: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
        """Write config.json and the other files, by name; all of them are complete, or there is no config.json."""
        config = json.dumps({self.schema: self.version, **meta}, indent=2, allow_nan=False) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
        try:
            for name, data in {**content, CONFIG: config.encode()}.items():
                (scratch / name).write_bytes(data)
            (folder / CONFIG).unlink(missing_ok=True)  # new results never stand beside an old config
            for name in self.files:
                os.replace(scratch / name, folder / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _marks(self, folder: Path) -> bool:
        """Whether config.json is of these results: many a config.json has a schema version."""
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return False
        return isinstance(config, dict) and self.schema in config and (folder / self.files[0]).exists()


def check_writable(folder: Path) -> None:
    """Raises OSError if the folder, or what is missing of its path, cannot be made and written to; leaves no trace."""
    made = []
    try:
        for part in (*reversed(folder.parents), folder):
            if not part.exists():
                part.mkdir()
                made.append(part)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    finally:
        for part in reversed(made):
            part.rmdir()


def tensor_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file. Written as bytes it gets the mode that the umask gives; `save_file` makes it 0600."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
